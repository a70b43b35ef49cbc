"""Real repositories, run tiny and sharpened, with a witness below: `nox -s repos -- FOLDER`."""
