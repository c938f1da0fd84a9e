"""What happens in a synthetic clip: coloured shapes that appear, move, blink, change and leave, and sounds.

`sample_scene` draws one consistent story; `wording.py` tells it and `synth.py` films it. Pure Python, so that the
annotation of a large set costs nothing. Visual happenings follow one another, sounds do too, and the two run
independently, so that a sound may fall on any visual happening.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from salmonn.synthetic.phrases import COLOURS, DIRECTIONS, SHAPES, SOUNDS

VisualKind = Literal["appear", "move", "blink", "change", "leave"]
Kind = VisualKind | Literal["sound"]
Place = tuple[int, int]
Colour = tuple[int, int, int]

# Seconds that a happening needs at least before the next one may begin. Blinking is off, on, off for half a second
# each and then half a second of rest, so that frames sampled at 2 per second see every phase.
NEEDED_SECONDS = {"appear": 0.7, "move": 1.0, "blink": 2.0, "change": 0.7, "leave": 0.7}
# Seconds that it spans at most: appear, change and leave take place at the start of their span, a move fills it.
LONGEST_SECONDS = {"appear": 1.5, "move": 1.3, "blink": 1.5, "change": 1.5, "leave": 1.5}
BLINK_PHASE_SECONDS = 0.5
QUIET_SECONDS = 0.3  # before the first happening, and between two sounds
# Share of the frame's side: clearance between shapes and from the border, and the shortest move.
GAP, SHORTEST_MOVE, LONGEST_MOVE = 0.03, 0.25, 0.7
DIAMETER = (0.25, 0.3)
# Objects rest in the middles of a grid of cells, each one patch of the toy model: a small vision transformer learns
# every shape anew for each place within a patch. On the grid it tells shapes and colours apart after 100 steps, at free
# places not in 600.
GRID = 3
TRIES = 1000


@dataclass(frozen=True)
class SynthConfig:
    """Sizes of a synthetic set. Clip i depends on all of these but `clips`, so that a longer set begins like a shorter.

    Args:
        clips: number of clips.
        seed: another seed gives other clips.
        size_pixels: side of the square frame.
        fps: frames per second.
        sample_rate_hz: of the mono sound.
        min_seconds, max_seconds: range of the clips' duration.
        min_visual, max_visual: range of the number of visual happenings.
        min_sounds, max_sounds: range of the number of sounds, all of different kinds.
        max_shapes: most objects of a clip, all of different shapes; the fewer, the more each of them does.
        questions: number of questions on a clip, each of another kind.
        kinds: of visual happenings, drawn evenly: what stands here twice comes twice as often. Objects appear in any
            case.
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
    # Moving has four forms to learn.
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
        # One colour and one sound stay out of every clip, for the mistakes of hasty captions.
        if self.max_visual >= len(COLOURS) or self.max_sounds >= len(SOUNDS):
            raise ValueError(
                f"max_visual must be below {len(COLOURS)}, the number of colours, and max_sounds below "
                f"{len(SOUNDS)}, the kinds of sounds: got {self.max_visual} and {self.max_sounds}"
            )


@dataclass(frozen=True)
class SceneEvent:
    """One thing that happens.

    Args:
        kind: appear, move, blink, change, leave or sound.
        start_seconds, end_seconds: when.
        shape: the object, since no two objects of a clip share a shape; empty for a sound.
        colour: the object's colour before the happening.
        value: direction of a move, new colour of a change, kind of a sound.
        place: centre of the object after the happening, in pixels from the top left.
        level: amplitude of a sound.
        pitch: factor on a tone's usual frequency.
    """

    kind: Kind
    start_seconds: float
    end_seconds: float
    shape: str = ""
    colour: str = ""
    value: str = ""
    place: Place = (0, 0)
    level: float = 0.4
    pitch: float = 1.0

    def overlaps(self, other: "SceneEvent") -> float:
        """Seconds for which both go on; negative is the gap between them."""
        return min(self.end_seconds, other.end_seconds) - max(self.start_seconds, other.start_seconds)


@dataclass(frozen=True)
class Scene:
    """All that a clip shows and sounds.

    Args:
        duration_seconds: of the clip.
        happenings: in order of their start.
        diameter: of every object, in pixels.
        background: colours of the top-left and the bottom-right corner.
        hiss: amplitude of the background noise.
        size_pixels: side of the square frame.
    """

    duration_seconds: float
    happenings: tuple[SceneEvent, ...]
    diameter: int = 28
    background: tuple[Colour, Colour] = ((40, 40, 40), (70, 70, 70))
    hiss: float = 0.0
    size_pixels: int = 96


@dataclass(frozen=True)
class SceneObject:
    """An object as it stands at one moment; `shown` is False in the dark phases of blinking."""

    shape: str
    colour: str
    place: Place
    shown: bool = True


def sample_scene(rng: random.Random, *, config: SynthConfig) -> Scene:
    """Draw a story that fits its duration.

    Raises:
        ValueError: no story of this many happenings fits the duration.
    """
    for _ in range(TRIES):
        duration = _on_frame(rng.uniform(config.min_seconds, config.max_seconds), config=config)
        diameter = round(rng.uniform(*DIAMETER) * config.size_pixels)
        visual = _draw_visual(rng, duration=duration, diameter=diameter, config=config)
        sounds = _draw_sounds(rng, duration=duration, config=config)
        if visual and sounds:
            happenings = sorted(visual + sounds, key=lambda happening: happening.start_seconds)
            background, hiss = _draw_background(rng), rng.choice((0.0, 0.001, 0.003))
            return Scene(duration, tuple(happenings), diameter, background, hiss, config.size_pixels)
    raise ValueError(
        f"found no scene of {config.min_visual}-{config.max_visual} visual happenings and "
        f"{config.min_sounds}-{config.max_sounds} sounds in {config.max_seconds} s: allow more seconds"
    )


def objects_at(scene: Scene, seconds: float) -> list[SceneObject]:
    """The objects on stage at a moment, in the order in which they appeared."""
    things: dict[str, SceneObject] = {}
    for happening in scene.happenings:
        since = seconds - happening.start_seconds
        if since < 0 or happening.kind == "sound":
            continue
        if happening.kind == "appear":
            things[happening.shape] = SceneObject(happening.shape, happening.colour, happening.place)
        elif happening.kind == "leave":
            del things[happening.shape]
        else:
            things[happening.shape] = _act(things[happening.shape], happening=happening, since=since)
    return list(things.values())


def _act(thing: SceneObject, *, happening: SceneEvent, since: float) -> SceneObject:
    length = happening.end_seconds - happening.start_seconds
    if happening.kind == "change":
        return replace(thing, colour=happening.value)
    if happening.kind == "blink":
        return replace(thing, shown=since >= length or int(since / BLINK_PHASE_SECONDS) % 2 == 1)
    share = min(since / length, 1.0)
    (x, y), (to_x, to_y) = thing.place, happening.place
    return replace(thing, place=(round(x + share * (to_x - x)), round(y + share * (to_y - y))))


def _on_frame(seconds: float, *, config: SynthConfig) -> float:
    """Whole frames, so that the written times are the shown ones."""
    return round(round(seconds * config.fps) / config.fps, 3)


def _draw_background(rng: random.Random) -> tuple[Colour, Colour]:
    """Two dark to middle greys with a tint: every shape colour is at least one channel brighter by far."""

    def corner() -> Colour:
        grey = rng.randint(25, 85)
        red, green, blue = (grey + rng.randint(-12, 12) for _ in range(3))
        return red, green, blue

    return corner(), corner()


def _spread(rng: random.Random, *, needs: Sequence[float], total: float) -> list[float] | None:
    """Starts of spans that need `needs` seconds each, with the spare time shared out at random; None: no room."""
    spare = total - QUIET_SECONDS - sum(needs)
    if spare < 0:
        return None
    parts = [rng.random() for _ in range(len(needs) + 1)]
    starts, now = [], QUIET_SECONDS
    for part, need in zip(parts, needs, strict=False):
        now += spare * part / sum(parts)
        starts.append(now)
        now += need
    return starts


def _draw_visual(rng: random.Random, *, duration: float, diameter: int, config: SynthConfig) -> list[SceneEvent] | None:
    number = rng.randint(config.min_visual, config.max_visual)
    num_shapes = rng.randint(min(2, config.max_shapes), config.max_shapes)
    stage = _Stage(rng, config=config, diameter=diameter, shapes=rng.sample(SHAPES, min(num_shapes, number)))
    story = []
    for left in range(number, 0, -1):
        happening = stage.play(must_appear=len(stage.waiting) == left or left == number)
        if happening is None:
            return None
        story.append(happening)
    starts = _spread(rng, needs=[NEEDED_SECONDS[happening.kind] for happening in story], total=duration)
    if starts is None:
        return None
    starts = [_on_frame(start, config=config) for start in starts]
    return [
        replace(
            happening,
            start_seconds=start,
            end_seconds=_on_frame(min(start + LONGEST_SECONDS[happening.kind], following), config=config),
        )
        for happening, start, following in zip(story, starts, [*starts[1:], duration], strict=True)
    ]


def _draw_sounds(rng: random.Random, *, duration: float, config: SynthConfig) -> list[SceneEvent] | None:
    kinds = rng.sample(list(SOUNDS), rng.randint(config.min_sounds, config.max_sounds))
    lengths = [rng.uniform(0.8, 1.6) for _ in kinds]
    starts = _spread(rng, needs=[length + QUIET_SECONDS for length in lengths], total=duration)
    if starts is None:
        return None
    return [
        SceneEvent(
            "sound",
            round(start, 2),
            round(start + length, 2),
            value=kind,
            level=round(rng.uniform(0.2, 0.7), 3),
            pitch=round(rng.uniform(0.84, 1.28), 3),
        )
        for kind, start, length in zip(kinds, starts, lengths, strict=True)
    ]


class _Stage:
    """Who is where while a story is drawn; times are set afterwards."""

    def __init__(self, rng: random.Random, *, config: SynthConfig, diameter: int, shapes: list[str]) -> None:
        self.rng = rng
        self.size = config.size_pixels
        self.diameter = diameter
        self.kinds = config.kinds
        self.grid = [round((cell + 0.5) * config.size_pixels / GRID) for cell in range(GRID)]
        self.waiting = shapes
        # A colour is used once in a clip, so that "the red circle" can never mean two things.
        self.colours = rng.sample(list(COLOURS), len(COLOURS))
        self.present: dict[str, tuple[str, Place]] = {}
        self.done: set[tuple[str, str, str]] = set()

    def play(self, *, must_appear: bool) -> SceneEvent | None:
        """The next happening, or None where nothing can be done."""
        drawn: Sequence[VisualKind] = ["appear"] if must_appear else self.rng.sample(self.kinds, len(self.kinds))
        for kind in drawn:
            happening = self._appear() if kind == "appear" else self._perform(kind)
            if happening:
                return happening
        return None

    def _appear(self) -> SceneEvent | None:
        for _ in range(50 if self.waiting else 0):
            place = (self.rng.choice(self.grid), self.rng.choice(self.grid))
            if all(self._apart(place, other) for _, other in self.present.values()):
                shape, colour = self.waiting.pop(0), self.colours.pop()
                self.present[shape] = (colour, place)
                return SceneEvent("appear", 0, 0, shape=shape, colour=colour, place=place)
        return None

    def _perform(self, kind: Kind) -> SceneEvent | None:
        options = [
            (shape, value)
            for shape in self.present
            for value in self._values(kind)
            if (kind, shape, value) not in self.done
        ]
        for shape, value in self.rng.sample(options, len(options)):
            colour, place = self.present[shape]
            target = self._target(shape, value) if kind == "move" else place
            if target is None:
                continue
            self.done.add((kind, shape, value))
            self.present[shape] = (value if kind == "change" else colour, target)
            if kind == "change":
                self.colours.remove(value)
            if kind == "leave":
                del self.present[shape]
            return SceneEvent(kind, 0, 0, shape=shape, colour=colour, value=value, place=target)
        return None

    def _values(self, kind: Kind) -> list[str]:
        if kind == "change":
            # Whoever still waits needs a colour of its own.
            return self.colours[len(self.waiting) :]
        return list(DIRECTIONS) if kind == "move" else [""]

    def _apart(self, place: Place, other: Place) -> bool:
        reach = self.diameter + round(GAP * self.size)
        return any(abs(a - b) >= reach for a, b in zip(place, other, strict=True))

    def _target(self, shape: str, direction: str) -> Place | None:
        """A free place in that direction; None where the border or another object is too near."""
        (dx, dy), (x, y) = DIRECTIONS[direction], self.present[shape][1]
        others = [place for other, (_, place) in self.present.items() if other != shape]
        ends = []
        for step in range(1, round(LONGEST_MOVE * self.size) + 1):
            place = (x + step * dx, y + step * dy)
            inside = all(self.grid[0] <= value <= self.grid[-1] for value in place)
            if not inside or not all(self._apart(place, other) for other in others):
                break
            if step >= SHORTEST_MOVE * self.size and all(value in self.grid for value in place):
                ends.append(place)
        return self.rng.choice(ends) if ends else None
