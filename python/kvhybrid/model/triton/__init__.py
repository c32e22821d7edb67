"""Attention over pages on CUDA, in Triton: imported only where Triton is, and never by the package itself."""
