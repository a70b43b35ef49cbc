"""The explorer: a page that carries queries and keys, and computes attention in the browser."""
