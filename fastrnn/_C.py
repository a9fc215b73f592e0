"""The compiled part (_C.pyi), which takes this module's place when it is imported."""

import sys

from fastrnn.binding import load

sys.modules[__name__] = load()
