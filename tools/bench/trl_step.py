"""A plain DPO step of ours against TRL's DPOTrainer on the same tokens: time and memory.

    python tools/bench/trl_step.py [--out bench.json] [--quick] [--repeats 3]

TRL takes no cached reference with vision, so both sides get text alone: the decoder of the bench's model with the same
adapter, a prompt as long as its clip, and no cross-entropy, which TRL's DPO has not. Both must give the same loss and
the same gradients of the adapter before any is timed. Needs trl 1.16 (pip install "trl>=1.16,<1.17"), which the project
does not; without it the bench says so and writes no row.
"""

import importlib.util
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from model import LORA, BenchConfig, adapt, make_captioner, make_words, start
from peft import get_peft_model_state_dict, set_peft_model_state_dict
from rows import BenchRow, alone, compare, interleave, peak_mib, tell
from step import compare_memory, require_same
from torch import Tensor
from transformers import Qwen2Config, Qwen2ForCausalLM

from salmonn.model.families.salmonn2 import Salmonn2
from salmonn.model.layout import Layout, ModelInputs
from salmonn.model.lora import adapter_disabled
from salmonn.preference.losses import guided_dpo_loss, sequence_logps
from salmonn.train.loop import autocast

PART = "step against TRL"
BETA = 0.1
NO_TRL = "trl is not installed (pip install 'trl>=1.16,<1.17'): our step was not compared with its DPOTrainer\n"


class Ours:
    """The library's network on two rows of text about one clip of no tokens.

    Args:
        config: what is run; the prompt is as long as its clip would be.
    """

    def __init__(self, config: BenchConfig) -> None:
        self.precision, shape = config.dtype, config.sizes
        captioner = make_captioner(shape, device=config.device, dtype=getattr(torch, config.dtype))
        self.network, self.tokenizer = captioner.network, captioner.processor.tokenizer
        # TRL is given the decoder as it is before the adapter is attached.
        self.decoder = {key: tensor.clone() for key, tensor in self.network.lm.state_dict().items()}
        adapt(self.network)
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
        nothing = Layout(order=torch.zeros(0, dtype=torch.long), positions=torch.zeros(3, 0).long(), num_visual=0)
        return ModelInputs(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            position_ids=torch.arange(ids.shape[1]).expand(3, 2, -1),
            labels=torch.tensor([[-100] * len(prompt) + answer for answer in answers]),
            clip_index=(0, 0),
            layouts=(nothing,),
            clip_features=(torch.zeros(0, self.network.lm.config.hidden_size),),
        )

    def compute_reference_logps(self) -> None:
        """The reference pass, once a round for each pair."""
        with torch.no_grad(), adapter_disabled(self.network), autocast(self.precision):
            self.reference = sequence_logps(self.network(self.inputs))

    def step(self) -> float:
        """One step of plain DPO."""
        self.optimizer.zero_grad()
        with autocast(self.precision):
            chosen, rejected = sequence_logps(self.network(self.inputs)).chunk(2)
        nothing = torch.zeros_like(chosen)
        loss = guided_dpo_loss(
            policy_chosen=chosen,
            policy_rejected=rejected,
            reference_chosen=self.reference[:1],
            reference_rejected=self.reference[1:],
            ground_truth_cross_entropy=nothing,
            beta=BETA,
            ce_weight=0.0,
        ).loss.sum()
        loss.backward()
        self.optimizer.step()
        return loss.item()

    def gradients(self) -> Tensor:
        """All of the adapter's, one after the other, in the order of PEFT's names."""
        return _gradients(self.network.lm)


def _gradients(model: Any) -> Tensor:
    named = sorted((name, parameter.grad) for name, parameter in model.named_parameters() if parameter.requires_grad)
    return torch.cat([grad.flatten().float().cpu() for _, grad in named])


class Theirs:
    """TRL's trainer of the same decoder, adapter and tokens; its own step, and the optimiser's.

    Args:
        ours: whose decoder, adapter and words these are.
        config: what is run.
        precomputed: with its precomputed reference.
        folder: that it may write to.
    """

    def __init__(self, ours: Ours, config: BenchConfig, *, precomputed: bool, folder: str) -> None:
        from datasets import Dataset  # noqa: PLC0415  (with trl, only where it is installed)
        from trl import DPOConfig, DPOTrainer  # noqa: PLC0415

        model = Qwen2ForCausalLM(Qwen2Config.from_dict(ours.network.lm.config.to_dict()))
        model.load_state_dict(ours.decoder)
        # The space is what parts the words where prompt and answer are joined.
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
                # Ours keeps all activations too.
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
        self.trainer.current_gradient_accumulation_steps = 1  # as its train() sets it
        set_peft_model_state_dict(self.model, get_peft_model_state_dict(ours.network.lm))
        self.batch = next(iter(self.trainer.get_train_dataloader()))
        self.optimizer = torch.optim.AdamW([one for one in self.model.parameters() if one.requires_grad], lr=0.0)

    def step(self) -> float:
        """Loss, gradients and the optimiser, as its training loop has them."""
        self.optimizer.zero_grad()
        loss = self.trainer.training_step(self.model, self.batch)
        self.optimizer.step()
        return float(loss)

    def gradients(self) -> Tensor:
        """All of the adapter's, one after the other, in the order of PEFT's names."""
        return _gradients(self.model)


def check(ours: Ours, theirs: Theirs, *, name: str, config: BenchConfig) -> None:
    """Both sides' tokens, losses and gradients are the same.

    Raises:
        ValueError: they are not, so there is nothing to be compared.
    """
    if not torch.equal(theirs.batch["input_ids"].cpu(), ours.inputs.input_ids.cpu()):
        raise ValueError(f"{name} was given other tokens")
    ours.compute_reference_logps()
    require_same(name, (theirs.step(), theirs.gradients()), (ours.step(), ours.gradients()), config=config)


THEIRS = {"TRL": False, "TRL, precomputed reference": True}


def run(config: BenchConfig) -> list[BenchRow]:
    """Rows of time and memory; none where TRL is not installed."""
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
    memory = {name: measured(config, name) for name in ("ours", *THEIRS)}
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


def measured(config: BenchConfig, side: str) -> BenchRow:
    """Peak memory of a side, in a process of its own."""
    flags = [f"--{name}={value}" for name, value in vars(config).items()]
    answer: BenchRow = alone(__file__, *flags, f"--memory_of={side}")
    return answer


def tell_memory(config: BenchConfig, side: str) -> None:
    """Run a side once, and tell what it took."""
    with tempfile.TemporaryDirectory() as folder:
        # A small step first: what libraries need in any case is not counted.
        _step_of(side, replace(config, shape="small"), folder=folder)()
        tell(peak_mib(_step_of(side, config, folder=folder)))


def _step_of(side: str, config: BenchConfig, *, folder: str) -> Callable[[], float]:
    ours = Ours(config)
    return ours.step if side == "ours" else Theirs(ours, config, precomputed=THEIRS[side], folder=folder).step


if __name__ == "__main__":
    start(__doc__, run, tell_memory)
