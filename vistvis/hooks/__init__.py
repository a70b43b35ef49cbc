"""What sits on a running model and takes the queries and keys that reach its kernels."""
