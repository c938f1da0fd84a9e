"""The table of rewards in the preference lab, by hand."""

# On `rich` states, Total falls by twice what accuracy rises; the other kind goes the other way.
RICH = [
    *(
        {"reward": f"rich, {clips} clips", "accuracy": 0.6 + clips / 1000, "total": 0.5 - clips / 500}
        for clips in (25, 50, 100)
    ),
    {"reward": "sum of log-probabilities", "accuracy": 0.9, "total": 0.6},
]


def run(*totals: float, judged: int = 0) -> dict:
    reward = [{"num_judged": judged, "num_captions": 100}] if judged else []
    rounds = [{"total": total, "repetition": total / 10, "hallucination": 0.05} for total in totals]
    return {"sft": {"total": 0.6, "repetition": 0.01}, "rounds": rounds, "reward": reward}


def test_claims_with_a_control_and_a_gap(load_tool):
    """The judge gains 40 points. The model gains 32 and 34 of them, and the labels alone 28 and 34."""
    tool = load_tool("lab_rewards")
    shared = {"judge": run(0.4, 0.2)}
    results = {
        2: shared
        | {"model": run(0.5, 0.28, judged=17), "labelled": run(0.32), "benchmark": {"pearson": -0.4, "rewards": RICH}},
        3: shared | {"model": run(0.26, judged=17), "labelled": run(0.26)},
    }
    lines = load_tool("lab_driver").make_table(tool.ROWS, results)
    rows = {line.split(" | ")[0].strip("| "): line.strip("| ").split(" | ")[1:] for line in lines}
    # Student's t for one degree of freedom is 12.706, and the standard error of two values half their difference.
    assert rows["share of the judge's gain, %: >= 80"] == ["80.0", "85.0", "82.5 (50.7 to 114.3)", "yes"]
    below = rows["points below the same labels without a model: >= 3"]
    assert below == ["4.0", "0.0", "2.0 (-23.4 to 27.4)", "**no**"]
    assert rows["share of the judge's calls, %"][:2] == ["17.0", "17.0"]
    assert rows["Repetition above the start's, points: <= 1"] == ["1.8", "1.6", "1.7 (0.4 to 3.0)", "**no**"]
    (benchmark,) = [cells for text, cells in rows.items() if text.startswith("**Benchmark**")]
    assert benchmark == ["-0.40", "", "", "**no** (1 of 2 seeds)"]
    assert rows["the same for rewards on `rich` states alone: >= 0.8"][0] == "1.00"
