"""The sample in data/ is what the generator writes."""

import dataclasses
import json
from pathlib import Path

from salmonn.files import read_records
from salmonn.records import Reference
from salmonn.synthetic.render import SynthConfig, sample_clip

SAMPLE = Path(__file__).parents[1] / "data" / "sample.jsonl"


def test_the_sample_equals_the_generators_output():
    references = read_records(SAMPLE, Reference)
    assert len(references) == 3
    for index, reference in enumerate(references):
        written = sample_clip(SynthConfig(seed=7), index=index)[1]
        assert json.dumps(dataclasses.asdict(reference)) == json.dumps(dataclasses.asdict(written))
