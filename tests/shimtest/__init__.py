"""containerd's public tests of shims, run by hand on this checkout's: docs/shimtest.md."""
