"""Sample what happens in a synthetic clip: coloured shapes that appear, move, blink, change or leave, and sounds.

`annotate.py` describes a scene in words and `render.py` renders it. Pure Python, so that annotating a large set is
cheap. Visual events follow one another, and so do sounds; the two sequences are independent, so that a sound may
coincide with any visual event.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from salmonn.synthetic.lexicon import COLOURS, DIRECTIONS, SHAPES, SOUNDS

VisualKind = Literal["appear", "move", "blink", "change", "leave"]
EventKind = VisualKind | Literal["sound"]
Position = tuple[int, int]
Colour = tuple[int, int, int]

# Minimum seconds from the start of an event to the start of the next. A blink is off, on and off for 0.5 s each,
# followed by 0.5 s of rest, so that frames sampled at 2 per second show every phase.
MIN_SECONDS = {"appear": 0.7, "move": 1.0, "blink": 2.0, "change": 0.7, "leave": 0.7}
# Maximum duration: appear, change and leave happen at the start of their span; a move lasts all of it.
MAX_SECONDS = {"appear": 1.5, "move": 1.3, "blink": 1.5, "change": 1.5, "leave": 1.5}
BLINK_PHASE_SECONDS = 0.5
QUIET_SECONDS = 0.3  # before the first event, and between two sounds
# Fractions of the frame's side: clearance between shapes and to the border, and length of a move.
GAP, SHORTEST_MOVE, LONGEST_MOVE = 0.03, 0.25, 0.7
DIAMETER = (0.25, 0.3)
# Objects rest at the centres of a grid of cells, each one patch of the toy model: a small vision transformer must learn
# every shape separately for each offset within a patch. On the grid it distinguishes shapes and colours after 100
# steps, at arbitrary positions not after 600.
GRID = 3
MAX_ATTEMPTS = 1000


@dataclass(frozen=True)
class SynthConfig:
    """Size and content of a synthetic set. Clip i depends on all fields except `clips`, so sets can be extended.

    Args:
        clips: number of clips.
        seed: random seed of the set.
        size_pixels: side of the square frame.
        fps: frames per second.
        sample_rate_hz: sample rate of the mono audio.
        min_seconds, max_seconds: range of clip durations.
        min_visual, max_visual: range of the number of visual events.
        min_sounds, max_sounds: range of the number of sounds, each of a different kind.
        max_shapes: maximum number of objects in a clip, all of different shapes; fewer objects act more often.
        questions: number of questions per clip, each of a different kind.
        kinds: kinds of visual events, sampled uniformly: a kind listed twice is twice as frequent. Objects always
            appear, even without "appear".
    """

    clips: int = 1000
    seed: int = 0
    size_pixels: int = 96
    fps: int = 10
    sample_rate_hz: int = 16_000
    min_seconds: float = 7.0
    max_seconds: float = 8.0
    min_visual: int = 4
    max_visual: int = 5
    min_sounds: int = 3
    max_sounds: int = 4
    max_shapes: int = 3
    questions: int = 3
    # A move has four directions to learn.
    kinds: tuple[VisualKind, ...] = ("appear", "move", "move", "blink", "change", "leave")

    def __post_init__(self) -> None:
        if self.clips < 0 or self.seed < 0 or self.fps < 1:
            raise ValueError(f"clips, seed and fps must be at least 0, 0 and 1: {self.clips}, {self.seed}, {self.fps}")
        if self.size_pixels < 32 or self.size_pixels % 2:
            raise ValueError(f"size_pixels must be even (H.264 halves the colour planes) and >= 32: {self.size_pixels}")
        ranges = {
            "seconds": (self.min_seconds, self.max_seconds),
            "visual": (self.min_visual, self.max_visual),
            "sounds": (self.min_sounds, self.max_sounds),
        }
        for name, (low, high) in ranges.items():
            if not 0 < low <= high:
                raise ValueError(f"min_{name} must be above 0 and at most max_{name}, got {low} and {high}")
        if self.questions < 0 or not self.kinds:
            raise ValueError(f"questions must be at least 0, and kinds not empty: {self.questions}, {self.kinds}")
        if not 1 <= self.max_shapes <= len(SHAPES):
            raise ValueError(f"max_shapes must be 1 to {len(SHAPES)}, the number of shapes: {self.max_shapes}")
        # Hasty captions need a colour and a sound that do not occur in the clip.
        if self.max_visual >= len(COLOURS) or self.max_sounds >= len(SOUNDS):
            raise ValueError(
                f"max_visual must be below {len(COLOURS)}, the number of colours, and max_sounds below "
                f"{len(SOUNDS)}, the kinds of sounds: got {self.max_visual} and {self.max_sounds}"
            )


@dataclass(frozen=True)
class SceneEvent:
    """One event of a scene.

    Args:
        kind: appear, move, blink, change, leave or sound.
        start_seconds, end_seconds: time span.
        shape: shape of the object, which identifies it within a clip; empty for a sound.
        colour: colour of the object before the event.
        value: direction of a move, new colour of a change, kind of a sound.
        position: centre of the object after the event, in pixels from the top left.
        amplitude: amplitude of a sound.
        pitch: factor on a tone's usual frequency.
    """

    kind: EventKind
    start_seconds: float
    end_seconds: float
    shape: str = ""
    colour: str = ""
    value: str = ""
    position: Position = (0, 0)
    amplitude: float = 0.4
    pitch: float = 1.0

    @property
    def num_pulses(self) -> int:
        """Number of beeps or clicks."""
        seconds = self.end_seconds - self.start_seconds
        if self.value == "beeps":
            return 3 if seconds < 1.2 else 4
        return min(max(round(seconds / 0.25), 4), 6)

    def overlap_seconds(self, other: "SceneEvent") -> float:
        """Return the overlap with another event in seconds; a negative value is the gap between them."""
        return min(self.end_seconds, other.end_seconds) - max(self.start_seconds, other.start_seconds)


@dataclass(frozen=True)
class Scene:
    """Everything a clip shows and plays.

    Args:
        duration_seconds: duration of the clip.
        events: events by start time.
        diameter: diameter of every object, in pixels.
        background: colours of the top-left and the bottom-right corner.
        noise_amplitude: amplitude of the background noise.
        size_pixels: side of the square frame.
    """

    duration_seconds: float
    events: tuple[SceneEvent, ...]
    diameter: int = 28
    background: tuple[Colour, Colour] = ((40, 40, 40), (70, 70, 70))
    noise_amplitude: float = 0.0
    size_pixels: int = 96


@dataclass(frozen=True)
class SceneObject:
    """An object at one moment; `visible` is False in the dark phases of a blink."""

    shape: str
    colour: str
    position: Position
    visible: bool = True


def sample_scene(rng: random.Random, *, config: SynthConfig) -> Scene:
    """Sample a scene whose events fit its duration.

    Raises:
        ValueError: the events do not fit the duration.
    """
    for _ in range(MAX_ATTEMPTS):
        duration = _round_to_frame(rng.uniform(config.min_seconds, config.max_seconds), config=config)
        diameter = round(rng.uniform(*DIAMETER) * config.size_pixels)
        visual = _sample_visual(rng, duration=duration, diameter=diameter, config=config)
        sounds = _sample_sounds(rng, duration=duration, config=config)
        if visual and sounds:
            events = sorted(visual + sounds, key=lambda event: event.start_seconds)
            background = (_sample_corner(rng), _sample_corner(rng))
            noise = rng.choice((0.0, 0.001, 0.003))
            return Scene(duration, tuple(events), diameter, background, noise, config.size_pixels)
    raise ValueError(
        f"found no scene of {config.min_visual}-{config.max_visual} visual events and "
        f"{config.min_sounds}-{config.max_sounds} sounds in {config.max_seconds} s: allow more seconds"
    )


def objects_at(scene: Scene, seconds: float) -> list[SceneObject]:
    """Return the objects present at a moment, in the order in which they appeared."""
    objects: dict[str, SceneObject] = {}
    for event in scene.events:
        elapsed = seconds - event.start_seconds
        if elapsed < 0 or event.kind == "sound":
            continue
        length = event.end_seconds - event.start_seconds
        if event.kind == "appear":
            objects[event.shape] = SceneObject(event.shape, event.colour, event.position)
        elif event.kind == "leave":
            del objects[event.shape]
        elif event.kind == "change":
            objects[event.shape] = replace(objects[event.shape], colour=event.value)
        elif event.kind == "blink":
            visible = elapsed >= length or int(elapsed / BLINK_PHASE_SECONDS) % 2 == 1
            objects[event.shape] = replace(objects[event.shape], visible=visible)
        else:
            share = min(elapsed / length, 1.0)
            (x, y), (to_x, to_y) = objects[event.shape].position, event.position
            position = (round(x + share * (to_x - x)), round(y + share * (to_y - y)))
            objects[event.shape] = replace(objects[event.shape], position=position)
    return list(objects.values())


def _round_to_frame(seconds: float, *, config: SynthConfig) -> float:
    """Round to whole frames, so that annotated times are exact."""
    return round(round(seconds * config.fps) / config.fps, 3)


def _sample_corner(rng: random.Random) -> Colour:
    """Sample a tinted dark to middle grey: every shape colour is much brighter in at least one channel."""
    grey = rng.randint(25, 85)
    red, green, blue = (grey + rng.randint(-12, 12) for _ in range(3))
    return red, green, blue


def _sample_starts(rng: random.Random, *, lengths: Sequence[float], total: float) -> list[float] | None:
    """Sample start times of consecutive spans, with random gaps between them; None if they exceed `total` seconds."""
    spare = total - QUIET_SECONDS - sum(lengths)
    if spare < 0:
        return None
    gaps = [rng.random() for _ in range(len(lengths) + 1)]
    starts, now = [], QUIET_SECONDS
    for gap, length in zip(gaps, lengths, strict=False):
        now += spare * gap / sum(gaps)
        starts.append(now)
        now += length
    return starts


def _sample_visual(
    rng: random.Random, *, duration: float, diameter: int, config: SynthConfig
) -> list[SceneEvent] | None:
    """Sample the visual events; None if the sampler gets stuck or they do not fit."""
    number = rng.randint(config.min_visual, config.max_visual)
    num_shapes = rng.randint(min(2, config.max_shapes), config.max_shapes)
    sampler = _VisualSampler(rng, config=config, diameter=diameter, shapes=rng.sample(SHAPES, min(num_shapes, number)))
    events = []
    for remaining in range(number, 0, -1):
        event = sampler.next_event(must_appear=len(sampler.waiting) == remaining or remaining == number)
        if event is None:
            return None
        events.append(event)
    starts = _sample_starts(rng, lengths=[MIN_SECONDS[event.kind] for event in events], total=duration)
    if starts is None:
        return None
    starts = [_round_to_frame(start, config=config) for start in starts]
    return [
        replace(
            event,
            start_seconds=start,
            end_seconds=_round_to_frame(min(start + MAX_SECONDS[event.kind], following), config=config),
        )
        for event, start, following in zip(events, starts, [*starts[1:], duration], strict=True)
    ]


def _sample_sounds(rng: random.Random, *, duration: float, config: SynthConfig) -> list[SceneEvent] | None:
    """Sample the sounds; None if they do not fit."""
    kinds = rng.sample(list(SOUNDS), rng.randint(config.min_sounds, config.max_sounds))
    lengths = [rng.uniform(0.8, 1.6) for _ in kinds]
    starts = _sample_starts(rng, lengths=[length + QUIET_SECONDS for length in lengths], total=duration)
    if starts is None:
        return None
    return [
        SceneEvent(
            "sound",
            round(start, 2),
            round(start + length, 2),
            value=kind,
            amplitude=round(rng.uniform(0.2, 0.7), 3),
            pitch=round(rng.uniform(0.84, 1.28), 3),
        )
        for kind, start, length in zip(kinds, starts, lengths, strict=True)
    ]


class _VisualSampler:
    """Samples visual events one after another, without times, and tracks the objects present."""

    def __init__(self, rng: random.Random, *, config: SynthConfig, diameter: int, shapes: list[str]) -> None:
        self.rng = rng
        self.size = config.size_pixels
        self.diameter = diameter
        self.kinds = config.kinds
        self.grid = [round((cell + 0.5) * config.size_pixels / GRID) for cell in range(GRID)]
        self.waiting = shapes
        # Each colour is used once in a clip, so that "the red circle" is unambiguous.
        self.colours = rng.sample(list(COLOURS), len(COLOURS))
        self.present: dict[str, tuple[str, Position]] = {}
        self.done: set[tuple[str, str, str]] = set()

    def next_event(self, *, must_appear: bool) -> SceneEvent | None:
        """Sample the next event; None if nothing is possible."""
        kinds: Sequence[VisualKind] = ["appear"] if must_appear else self.rng.sample(self.kinds, len(self.kinds))
        for kind in kinds:
            event = self._appear() if kind == "appear" else self._act(kind)
            if event:
                return event
        return None

    def _appear(self) -> SceneEvent | None:
        for _ in range(50 if self.waiting else 0):
            position = (self.rng.choice(self.grid), self.rng.choice(self.grid))
            if all(self._are_apart(position, other) for _, other in self.present.values()):
                shape, colour = self.waiting.pop(0), self.colours.pop()
                self.present[shape] = (colour, position)
                return SceneEvent("appear", 0, 0, shape=shape, colour=colour, position=position)
        return None

    def _act(self, kind: VisualKind) -> SceneEvent | None:
        """Let an object present do something that it has not done yet."""
        values = [""]
        if kind == "change":
            values = self.colours[len(self.waiting) :]  # each waiting object needs its own colour
        elif kind == "move":
            values = list(DIRECTIONS)
        options = [(shape, value) for shape in self.present for value in values]
        options = [option for option in options if (kind, *option) not in self.done]
        for shape, value in self.rng.sample(options, len(options)):
            colour, position = self.present[shape]
            target = self._sample_target(shape, value) if kind == "move" else position
            if target is None:
                continue
            self.done.add((kind, shape, value))
            self.present[shape] = (value if kind == "change" else colour, target)
            if kind == "change":
                self.colours.remove(value)
            if kind == "leave":
                del self.present[shape]
            return SceneEvent(kind, 0, 0, shape=shape, colour=colour, value=value, position=target)
        return None

    def _are_apart(self, position: Position, other: Position) -> bool:
        distance = self.diameter + round(GAP * self.size)
        return any(abs(a - b) >= distance for a, b in zip(position, other, strict=True))

    def _sample_target(self, shape: str, direction: str) -> Position | None:
        """Sample a free position in a direction; None if the border or another object is too close."""
        (dx, dy), (x, y) = DIRECTIONS[direction], self.present[shape][1]
        others = [position for other, (_, position) in self.present.items() if other != shape]
        targets = []
        for step in range(1, round(LONGEST_MOVE * self.size) + 1):
            position = (x + step * dx, y + step * dy)
            inside = all(self.grid[0] <= value <= self.grid[-1] for value in position)
            if not inside or not all(self._are_apart(position, other) for other in others):
                break
            if step >= SHORTEST_MOVE * self.size and all(value in self.grid for value in position):
                targets.append(position)
        return self.rng.choice(targets) if targets else None
