"""Draws the three sample views that the package carries, from free photographs in scikit-image.

    python training/samples.py

Writes vggt_adapter/samples/view_{1,2,3}.jpg, and scene.npz, from which `vggt_adapter.sample_scene`
knows the points that they show. The same script makes the same files again; true correspondences
come from `sample_scene` and `rendering.correspond`.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import rendering as scenes
from PIL import Image
from rendering import Camera, Surface, Texture
from skimage import data

OUT = Path(__file__).resolve().parent.parent / "vggt_adapter" / "samples"
SIZE = (420, 560)


def tinted(grey: np.ndarray, colour: tuple[float, float, float]) -> Texture:
    """A grey picture in one colour."""
    return Texture((grey[..., None] * np.array(colour)).clip(0, 255).astype(np.uint8))


def sample_scene() -> tuple[list[Surface], list[Camera]]:
    """A room with a starry wall, a lawn for a floor, three pictures and two boxes."""
    wall = Texture((255 * (data.hubble_deep_field()[:700, :900] / 255.0) ** 0.55).astype(np.uint8))
    astronaut, cat, cup = Texture(data.astronaut()), Texture(data.chelsea()), data.coffee()
    rocket = Texture(data.rocket()[:, 120:560])
    surfaces = [
        scenes.rectangle(centre=(0, -0.6, 6.5), size=(13, 8), texture=wall, label=0, yaw=6),
        scenes.rectangle(
            centre=(0, 1.25, 4.5),
            size=(13, 6),
            texture=tinted(data.grass(), (0.75, 1.1, 0.5)),
            label=1,
            pitch=90,
        ),
        scenes.rectangle(
            centre=(-1.25, 0.1, 3.9), size=(1.7, 1.7), texture=astronaut, label=2, yaw=-18
        ),
        scenes.rectangle(
            centre=(1.45, -0.72, 5.3), size=(1.9, 1.9), texture=rocket, label=3, yaw=20, roll=-4
        ),
        scenes.rectangle(centre=(0.22, 0.36, 4.6), size=(1.65, 1.1), texture=cat, label=4, yaw=-6),
    ]
    surfaces += scenes.box(
        centre=(0.95, 0.72, 3.2),
        size=(0.8, 0.8, 0.8),
        textures=[Texture(cup[:, 80:480]), cat, Texture(cup[60:380, 120:440])],
        label=5,
        yaw=33,
    )
    surfaces += scenes.box(
        centre=(-0.3, 0.86, 2.75),
        size=(0.55, 0.55, 0.55),
        textures=[tinted(data.brick(), (1.25, 0.7, 0.5)), rocket],
        label=6,
        yaw=-25,
    )
    cameras = [
        Camera.look_at(place, (place[0] * 0.25, 0.1, 4.0), focal=520, size=SIZE)
        for place in ((-0.75, -0.15, 0.1), (0.0, -0.35, -0.1), (0.8, -0.1, 0.2))
    ]
    return surfaces, cameras


def scene_arrays() -> dict[str, np.ndarray]:
    """Of scene.npz: rectangles `(n, 3, 3)` of corner, u and v; cameras `(3, 3, 4)`, world to camera
    as OpenCV's; the focal length in pixels and the size (H, W) of the pictures."""
    surfaces, cameras = sample_scene()
    turns = [camera.axes.T for camera in cameras]
    shifts = [-turn @ camera.position[:, None] for turn, camera in zip(turns, cameras, strict=True)]
    return {
        "rectangles": np.array([(s.corner, s.u, s.v) for s in surfaces]),
        "cameras": np.concatenate([turns, shifts], 2),
        "focal": np.array(cameras[0].focal),
        "size": np.array(SIZE),
    }


if __name__ == "__main__":
    OUT.mkdir(parents=True, exist_ok=True)
    surfaces, cameras = sample_scene()
    for number, camera in enumerate(cameras, 1):
        view = scenes.render(surfaces, camera, per_pixel=3)
        Image.fromarray(view.image).save(OUT / f"view_{number}.jpg", quality=84, optimize=True)
    np.savez_compressed(OUT / "scene.npz", **scene_arrays())
