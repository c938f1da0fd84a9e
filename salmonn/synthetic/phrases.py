"""The words of the synthetic world: what can be shown and heard in it, and the ways to say it.

The tables are shared by the writer of captions (`wording.py`) and by the rule judge, which reads any of them back.
`{a}` is the object with "a", `{the}` with "the" (or "it" where it was just named); the first form is the canonical one
that the event list uses.
"""

COLOURS = {
    "red": (225, 40, 40),
    "green": (40, 185, 70),
    "blue": (50, 90, 235),
    "yellow": (240, 220, 50),
    "purple": (160, 60, 200),
    "orange": (245, 140, 30),
    "white": (245, 245, 245),
}
SHAPES = ("circle", "square", "triangle", "star", "cross")
DIRECTIONS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}

APPEAR = ("{a} appears", "{a} shows up", "{a} comes into view", "{a} pops up", "{a} can now be seen")
LEAVE = ("{the} disappears", "{the} vanishes", "{the} goes away", "{the} is gone", "{the} leaves the picture")
BLINK = ("{the} blinks", "{the} flashes on and off", "{the} flickers", "{the} blinks a few times")
CHANGE = (
    "{the} turns {colour}",
    "{the} becomes {colour}",
    "{the} changes to {colour}",
    "{the} changes its colour to {colour}",
)
MOVE = {
    "left": ("{the} moves to the left", "{the} slides to the left", "{the} moves left", "{the} drifts leftwards"),
    "right": ("{the} moves to the right", "{the} slides to the right", "{the} moves right", "{the} drifts rightwards"),
    "up": ("{the} moves up", "{the} slides up", "{the} rises to the top", "{the} drifts upwards"),
    "down": ("{the} moves down", "{the} slides down", "{the} sinks to the bottom", "{the} drifts downwards"),
}
# kind of sound -> noun phrases; each goes with each of HEARD
SOUNDS = {
    "low tone": ("a low tone", "a deep tone", "a low-pitched tone"),
    "high tone": ("a high tone", "a high-pitched tone", "a shrill tone"),
    "rising sweep": ("a rising sweep", "a rising sound", "a sound that climbs in pitch"),
    "falling sweep": ("a falling sweep", "a falling sound", "a sound that drops in pitch"),
    "beeps": ("a series of beeps", "a row of beeps", "repeated beeps"),
    "clicks": ("a series of clicks", "a row of clicks", "repeated clicks"),
    "noise": ("a burst of noise", "a hissing noise", "a rush of static"),
}
HEARD = ("{sound} is heard", "{sound} plays", "{sound} can be heard", "we hear {sound}", "there is {sound}")
