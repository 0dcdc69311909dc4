"""Declared messages and methods of every protocol casemate speaks, one module per protocol."""
