"""Reads the public-domain texts that Debian packages carry: the King James Bible and The Devil's Dictionary."""

import gzip
import re
import subprocess

DEVIL = "/usr/share/dictd/devil.dict.dz"


def verses():
    """All verses in order, without their references. `bible` (package bible-kjv) prints one on each line."""
    shown = subprocess.run(["bible", "-f"], input="gen 1:1-rev 22:21\n", capture_output=True, text=True, check=True).stdout
    found = re.findall(r"^\w+?\d+:\d+ (.+)$", shown, re.M)
    found = [re.sub(r"\s+", " ", v).strip() for v in found]
    assert len(found) > 31000, len(found)
    return found


def devil():
    """The entries of The Devil's Dictionary, line breaks undone."""
    text = gzip.open(DEVIL, "rt", encoding="utf-8", errors="replace").read()
    text = text[text.index("PREFACE"):]
    blocks = [re.sub(r"\s+", " ", b).strip() for b in re.split(r"\n\s*\n", text)]
    return [b.replace("_", "") for b in blocks if len(b) > 40]
