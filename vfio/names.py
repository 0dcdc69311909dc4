"""Names of vendors and devices, from the pci.ids file that distributions install (pci.ids or hwdata).

A host without the file has ids instead of names, and nothing else changes. The file has 35,000 lines, of
which a few are wanted: they are searched for, not parsed.
"""

import re

FILES = ("/usr/share/misc/pci.ids", "/usr/share/hwdata/pci.ids")
_NEXT_VENDOR = re.compile(r"\n[^\t#\n]")


class PciNames:
    """Looks up what it is asked for, once. text is the file's: vendors at the margin, devices after a tab."""

    def __init__(self, text: str = "") -> None:
        self._text = "\n" + text
        self._vendors: dict[int, tuple[str, str]] = {}

    @classmethod
    def read(cls, files: tuple[str, ...] = FILES) -> "PciNames":
        """From the first of the files that is there; without names if none is."""
        for path in files:
            try:
                with open(path, encoding="utf-8", errors="replace") as file:
                    return cls(file.read())
            except FileNotFoundError:
                continue
        return cls()

    def vendor(self, vendor_id: int) -> str:
        """ "NVIDIA Corporation", or "" where it is not known."""
        return self._vendor(vendor_id)[0]

    def device(self, vendor_id: int, device_id: int) -> str:
        """ "GH100 [H100 SXM5 80GB]", or ""."""
        return _line(self._vendor(vendor_id)[1], f"\n\t{device_id:04x}  ")

    def _vendor(self, vendor_id: int) -> tuple[str, str]:
        """Its name, and all lines of its devices."""
        if vendor_id not in self._vendors:
            mark = f"\n{vendor_id:04x}  "
            begin = self._text.find(mark)
            if begin < 0:
                self._vendors[vendor_id] = ("", "")
            else:
                begin += len(mark)
                following = _NEXT_VENDOR.search(self._text, begin)
                name, _, devices = self._text[begin : following.start() if following else None].partition(
                    "\n"
                )
                self._vendors[vendor_id] = (name.strip(), "\n" + devices)
        return self._vendors[vendor_id]


def _line(text: str, mark: str) -> str:
    begin = text.find(mark)
    if begin < 0:
        return ""
    begin += len(mark)
    end = text.find("\n", begin)
    return text[begin : len(text) if end < 0 else end].strip()
