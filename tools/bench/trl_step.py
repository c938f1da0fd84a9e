"""Benchmark a plain DPO step against TRL's DPOTrainer on the same tokens: time and memory.

    python tools/bench/trl_step.py [--out bench.json] [--quick] [--repeats 3]

TRL does not support precomputed reference log-probabilities with vision, so both sides get text only: the decoder of
the benchmark model with the same adapter, a prompt as long as the clip, and no cross-entropy, which TRL's DPO lacks.
Both must give the same loss and adapter gradients before any is timed. Without trl 1.16 (pip install
"trl>=1.16,<1.17"), which the project itself does not need, a message is printed and no row is written.
"""

import importlib.util
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from model import LORA, BenchConfig, attach_adapter, make_captioner, make_words, start
from peft import get_peft_model_state_dict, set_peft_model_state_dict
from rows import BenchRow, compare, emit_json, interleave, peak_mib, run_isolated
from step import compare_memory, require_equal
from torch import Tensor
from transformers import Qwen2Config, Qwen2ForCausalLM

from salmonn.model.families.salmonn2 import Salmonn2
from salmonn.model.layout import Layout, ModelInputs
from salmonn.preference.losses import LossConfig, Role, RoleLogps, guided_loss
from salmonn.train.loop import autocast

PART = "step against TRL"
BETA = 0.1
NO_TRL = "trl is not installed (pip install 'trl>=1.16,<1.17'): the comparison with its DPOTrainer was skipped\n"


class Ours:
    """The library's network on two rows of text about a clip without tokens.

    Args:
        config: settings of the benchmark; the prompt is as long as its clip would be.
    """

    def __init__(self, config: BenchConfig) -> None:
        self.precision, shape = config.dtype, config.sizes
        captioner = make_captioner(shape, device=config.device, dtype=getattr(torch, config.dtype))
        self.network, self.tokenizer = captioner.network, captioner.processor.tokenizer
        # TRL gets the decoder as it is before the adapter is attached.
        self.decoder = {key: tensor.clone() for key, tensor in self.network.lm.state_dict().items()}
        attach_adapter(self.network)
        family = captioner.processor.family
        assert isinstance(family, Salmonn2)
        length = shape.num_frames * family.tokens_per_frame
        self.prompt, self.chosen, self.rejected = (
            make_words(count, shape=shape, seed=seed)
            for seed, count in enumerate([length, shape.answer_tokens, shape.answer_tokens])
        )
        self.inputs = self._inputs().to(config.device)
        self.optimizer = torch.optim.AdamW([one for one in self.network.parameters() if one.requires_grad], lr=0.0)
        self.reference = torch.zeros(2, device=config.device)

    def _inputs(self) -> ModelInputs:
        end = self.tokenizer.eos_token_id
        prompt = self.tokenizer.encode(self.prompt)
        answers = [[*self.tokenizer.encode(text), end] for text in (self.chosen, self.rejected)]
        ids = torch.tensor([prompt + answer for answer in answers])
        empty = Layout(order=torch.zeros(0, dtype=torch.long), positions=torch.zeros(3, 0).long(), num_visual=0)
        return ModelInputs(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            position_ids=torch.arange(ids.shape[1]).expand(3, 2, -1),
            labels=torch.tensor([[-100] * len(prompt) + answer for answer in answers]),
            clip_index=(0, 0),
            layouts=(empty,),
            clip_features=(torch.zeros(0, self.network.lm.config.hidden_size),),
        )

    def compute_reference_logps(self) -> None:
        """Run the reference policy, which is done once per round and pair."""
        with torch.no_grad(), self.network.lm.disable_adapter(), autocast(self.precision):
            self.reference = self.network(self.inputs).sum(-1)

    def step(self) -> float:
        """Run one step of plain DPO."""
        self.optimizer.zero_grad()
        with autocast(self.precision):
            policy = self.network(self.inputs).sum(-1)
        num_tokens = (self.inputs.labels != -100).sum(-1)
        rows: dict[Role, slice] = {"chosen": slice(0, 1), "rejected": slice(1, 2)}
        logps = {role: RoleLogps(policy[row], num_tokens[row], self.reference[row]) for role, row in rows.items()}
        ground_truth = RoleLogps(torch.zeros_like(policy[:1]), num_tokens[:1])  # without weight
        loss = guided_loss(logps | {"ground_truth": ground_truth}, LossConfig(beta=BETA, ce_weight=0.0)).loss.sum()
        loss.backward()
        self.optimizer.step()
        return loss.item()


class Theirs:
    """TRL's trainer with the same decoder, adapter and tokens."""

    def __init__(self, ours: Ours, config: BenchConfig, *, precomputed: bool, folder: str) -> None:
        from datasets import Dataset  # noqa: PLC0415  (with trl, only where it is installed)
        from trl import DPOConfig, DPOTrainer  # noqa: PLC0415

        model = Qwen2ForCausalLM(Qwen2Config.from_dict(ours.network.lm.config.to_dict()))
        model.load_state_dict(ours.decoder)
        # The space separates the words where prompt and answer are concatenated.
        pair = {"prompt": ours.prompt, "chosen": f" {ours.chosen}", "rejected": f" {ours.rejected}"}
        self.trainer = DPOTrainer(
            model=model.to(config.device, getattr(torch, config.dtype)),
            args=DPOConfig(
                output_dir=folder,
                per_device_train_batch_size=1,
                beta=BETA,
                max_length=None,
                learning_rate=0.0,
                bf16=config.dtype == "bfloat16",
                # Ours does not use it either.
                gradient_checkpointing=False,
                precompute_ref_log_probs=precomputed,
                use_cpu=config.device == "cpu",
                report_to="none",
                disable_tqdm=True,
            ),
            train_dataset=Dataset.from_list([pair]),
            processing_class=ours.tokenizer,
            peft_config=LORA.to_peft(),
        )
        self.model = self.trainer.model
        self.trainer.current_gradient_accumulation_steps = 1  # set by its train()
        set_peft_model_state_dict(self.model, get_peft_model_state_dict(ours.network.lm))
        self.batch = next(iter(self.trainer.get_train_dataloader()))
        self.optimizer = torch.optim.AdamW([one for one in self.model.parameters() if one.requires_grad], lr=0.0)

    def step(self) -> float:
        """Run loss, backward and optimizer step as its training loop does."""
        self.optimizer.zero_grad()
        loss = self.trainer.training_step(self.model, self.batch)
        self.optimizer.step()
        return float(loss)


def check(ours: Ours, theirs: Theirs, *, name: str, config: BenchConfig) -> None:
    """Check that tokens, losses and gradients of both sides are equal.

    Raises:
        ValueError: they are not.
    """
    if not torch.equal(theirs.batch["input_ids"].cpu(), ours.inputs.input_ids.cpu()):
        raise ValueError(f"{name} got other tokens than ours")

    def gradients(model: Any) -> Tensor:
        """Return all gradients of the adapter, concatenated in the order of PEFT's names."""
        named = sorted((name, one.grad) for name, one in model.named_parameters() if one.requires_grad)
        return torch.cat([grad.flatten().float().cpu() for _, grad in named])

    ours.compute_reference_logps()
    found, expected = (theirs.step(), gradients(theirs.model)), (ours.step(), gradients(ours.network.lm))
    require_equal(name, found, expected, config=config)


THEIRS = {"TRL": False, "TRL, precomputed reference": True}


def run(config: BenchConfig) -> list[BenchRow]:
    """Measure time and memory; return no rows if TRL is not installed."""
    if not importlib.util.find_spec("trl"):
        sys.stderr.write(NO_TRL)
        return []
    ours = Ours(config)
    with tempfile.TemporaryDirectory() as folder:
        sides: dict[str, Callable[[], object]] = {"ours": ours.step, "reference": ours.compute_reference_logps}
        for name, precomputed in THEIRS.items():
            theirs = Theirs(ours, config, precomputed=precomputed, folder=folder)
            check(ours, theirs, name=name, config=config)
            sides[name] = theirs.step
        timings = interleave(sides, repeats=config.repeats)
    memory = {name: run_isolated(__file__, **vars(config), memory_of=name) for name in ("ours", *THEIRS)}
    rows = [
        compare(name, timings["ours"], timings[name]) | compare_memory(memory["ours"], memory[name]) for name in THEIRS
    ]
    rows.insert(
        1, compare("TRL, our reference pass counted in", timings["ours"] + timings["reference"], timings["TRL"])
    )
    length = ours.inputs.input_ids.shape[1] - config.sizes.answer_tokens - 1
    part = (
        f"{PART}: text alone, {length} tokens of prompt, {config.sizes.answer_tokens} of each answer, no cross-entropy"
    )
    return [row | {"part": part} for row in rows]


def report_memory(config: BenchConfig, side: str) -> None:
    """Measure the peak memory of a side in this process and write it as JSON."""
    with tempfile.TemporaryDirectory() as folder:
        # A small step first, so that what libraries allocate once is not counted.
        _make_step(side, replace(config, shape="small"), folder=folder)()
        emit_json(peak_mib(_make_step(side, config, folder=folder)))


def _make_step(side: str, config: BenchConfig, *, folder: str) -> Callable[[], float]:
    ours = Ours(config)
    return ours.step if side == "ours" else Theirs(ours, config, precomputed=THEIRS[side], folder=folder).step


if __name__ == "__main__":
    start(__doc__, run, report_memory)
