"""Exit codes: 0 all done, 1 some videos or captions failed (the others' results are written), 2 wrong usage."""

SOME_FAILED, WRONG_USAGE = 1, 2
