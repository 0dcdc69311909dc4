"""Public tests of file systems, run in containers of runc's and of casemate's: docs/filesystems.md."""
