"""salmonn: open audio-visual video captioning that teaches itself (video-SALMONN 2 and mrDPO)."""

__version__ = "0.1.0"
