"""salmonn: open audio-visual video captioning that teaches itself (video-SALMONN 2 and mrDPO)."""

import logging

__version__ = "0.1.0"

# PEFT imports bitsandbytes where it is installed, which then warns on some CPUs of a package that nothing here needs.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
