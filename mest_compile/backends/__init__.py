"""Kinds of device, a folder each: how code is made, loaded, linked and run. `backend.py` answers
`hardware.backend.Backend`."""
