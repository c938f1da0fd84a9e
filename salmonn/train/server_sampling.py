"""Sampling of captions for training through a server that runs the model: vLLM, SGLang or `salmonn serve`.

1. Before anything else, the server is tested: that it takes clips and hears, that it loads an adapter of the largest
   rank of the run, and that the adapter changes its answers.
2. For each round, the adapters of the rounds before are stacked to one that equals their sum, and loaded.
3. Each process sends the requests of its share of the clips. The captions of a clip are written as soon as they are
   complete, so that a killed run resumes from there.

The server rounds and batches in its own way: captions do not repeat to the bit, as those of the local model do.
"""

import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Literal

from tqdm import tqdm

from salmonn import dist
from salmonn.caption.generator import CaptionRequest, Sampling
from salmonn.caption.hearing import write_probe_clips
from salmonn.caption.loader import ClipReader
from salmonn.caption.processor import Processor
from salmonn.caption.server import ServerCaptioner
from salmonn.caption.server_adapters import VLLM_MAX_RANKS, AdapterLoader
from salmonn.caption.server_connection import connect_captioner
from salmonn.caption.server_options import ServerOptions
from salmonn.config import MAY_CHANGE
from salmonn.files import atomic_folder, read_json, read_records, write_json, write_records
from salmonn.model.adapters import stack_adapters, write_random_adapter
from salmonn.model.loading import is_own_layout
from salmonn.model.lora import ADAPTER_WEIGHTS_NAME, LoraConfig
from salmonn.model.publish import write_adapter
from salmonn.records import Caption, Failure, Modality
from salmonn.train.data import ClipSet
from salmonn.train.dry_run import build_on_meta
from salmonn.train.run_folder import load_or_create
from salmonn.train.sampling import CAPTIONS_NAME, PARTIAL_NAME, SampleConfig

log = logging.getLogger(__name__)

_REQUEST_NAME = "request.json"  # file among the captions of finished clips that says what they are captions of
_SHARE_SEED_STEP = 15_485_863  # between the seeds of shares, below the 2^31 seeds that servers take
_PROBE_TOKENS = 8
_OPTIONS = tuple(one.name.replace("_", "-") for one in fields(ServerOptions))


@dataclass(frozen=True)
class SamplerConfig(ServerOptions):
    """Where captions of the training clips are sampled: by the model in this process, or through a server.

    Args:
        server: address of a server that runs the model that the run starts from; none samples in this process.
        server_input: what the server is sent: frames (those that the local model takes, as images with their times, and
            the audio as WAV), video (the file with its sound), video+audio (the file, and its audio as WAV); auto means
            frames, and the file for `salmonn serve`.
        server_max_pixels: without effect here, as frames have the sizes that the local model takes.
        adapters_dir: folder for the adapters of the rounds, which the server must be able to read under the same path;
            none for `adapters` in the run's folder.
        base: folder or hub id of the model on the server, whose names of weights the adapters get; none for the model
            that the run starts from.
        max_rank: largest rank of an adapter; a sum of rounds of larger rank is replaced by its best approximation of
            this rank (by singular values), whose error is logged. None for the exact sum.
        workers: number of processes that read clips; 0 reads in a thread.
    """

    server_frame_format: Literal["jpeg", "png"] = "png"
    adapters_dir: Path | None = field(default=None, metadata=MAY_CHANGE)
    base: str | None = None
    max_rank: int | None = None
    workers: int = field(default=4, metadata=MAY_CHANGE)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.server is None:
            values = {one.name: one.default for one in fields(self)}
            if changed := [name for name, default in values.items() if getattr(self, name) != default]:
                raise ValueError(f"sampler.{changed[0]} has no effect without sampler.server")
            return
        if self.server_model is None:
            raise ValueError("sampler.server needs the name of the model on it: pass --sampler.server-model")
        if self.server_max_pixels != ServerOptions.server_max_pixels:
            raise ValueError("sampler.server_max_pixels has no effect; set frames, such as --frames.max-pixels 200704")
        if self.workers < 0 or (self.max_rank is not None and self.max_rank < 1):
            raise ValueError(
                f"sampler.workers must be at least 0 and sampler.max_rank at least 1, got {self.workers} and "
                f"{self.max_rank}"
            )

    def share(self, processes: int) -> "SamplerConfig":
        """Return the options of one of several processes, which share the concurrency and the caps."""
        caps = {name: getattr(self, name) for name in ("max_requests", "max_tokens_total")}
        if small := [name for name, cap in caps.items() if cap is not None and cap < processes]:
            raise ValueError(f"{processes} processes cannot share sampler.{small[0]} {caps[small[0]]}; raise it")
        requests, tokens = (None if cap is None else cap // processes for cap in caps.values())
        concurrency = max(1, self.concurrency // processes)
        return replace(self, concurrency=concurrency, max_requests=requests, max_tokens_total=tokens)


class ServerSampler:
    """Samples captions through a server.

    Args:
        config: server and limits.
        processor: processor of the model that the run starts from.
        model: folder or hub id of that model.
        lora: adapter of a round.
        max_adapters: largest number of adapters that a model of the run consists of.
        out: folder of the run.
        reader: decoder of video frames, see `read_clip`.
        overrides_frames: whether the run overrides the model's frame sampler.

    Raises:
        ValueError: the processes cannot share a cap.
    """

    def __init__(
        self,
        config: SamplerConfig,
        processor: Processor,
        *,
        model: str,
        lora: LoraConfig,
        max_adapters: int,
        out: Path,
        reader: str = "pyav",
        overrides_frames: bool = False,
    ) -> None:
        self.config = config.share(dist.world_size())
        self._processor, self._model, self._lora, self._reader = processor, model, lora, reader
        self._max_rank = min(lora.rank * max_adapters, config.max_rank or lora.rank * max_adapters)
        self._folder = (config.adapters_dir or out / "adapters").resolve()
        # Runs in folders of the same name may share a server, or a folder for adapters.
        path_hash = hashlib.sha256(os.fsencode(out.resolve())).hexdigest()[:8]
        self._run, self._overrides_frames = f"{out.resolve().name}-{path_hash}", overrides_frames
        self._generator: ServerCaptioner | None = None
        self._is_own = False
        self._loader: AdapterLoader | None = None  # of rank 0

    def connect(self) -> ServerCaptioner:
        """Connect to the server and test it on rank 0, once.

        Raises:
            ValueError: the server cannot be used; the message says why, and what to change.
        """
        if self._generator:
            return self._generator
        config = self.config
        assert config.server_model
        generator = self._connect_and_test() if dist.is_main() else ServerCaptioner(config, reader=self._reader)
        found = dist.gather([(generator.input, generator.is_own)])  # what rank 0 has found
        generator.input, generator.is_own = found[0]
        generator.sampler, generator.accepts_empty = self._processor.family.frame_sampler, True
        self._generator = generator
        if dist.is_main():
            log.info("captions are sampled by %s, which is sent %s", generator.name, generator.input)
        return generator

    def _connect_and_test(self) -> ServerCaptioner:
        """Connect to the server on rank 0; raises as `connect`."""
        config = self.config
        try:
            generator = connect_captioner(
                config, modality=self._modality, cuts_files=config.server_input == "auto", reader=self._reader
            )
        except ValueError as error:
            raise ValueError(_with_own_flags(str(error))) from error
        if generator.is_own and self._overrides_frames:
            raise ValueError(
                "frames changes which frames the model is trained on, and `salmonn serve` samples them by the model's "
                "own rule; remove frames, or sample without sampler.server"
            )
        self._is_own, self._loader = generator.is_own, AdapterLoader(generator.client)
        if self._max_rank:
            self._test_adapters(generator, self._loader)
        return generator

    def sample(
        self,
        adapters: Sequence[Path],
        clips: ClipSet,
        sampling: SampleConfig,
        *,
        name: str,
        seed: int,
        folder: Path,
        on_part: Callable[[Sequence[Caption]], object] | None = None,
    ) -> list[Caption]:
        """Sample captions of clips, as `sample_captions`, with the model that consists of the start and adapters.

        A part is a clip.

        Raises:
            ValueError: the server cannot be used, or does not caption some of the clips.
        """
        partial = folder / PARTIAL_NAME

        def sample_all() -> list[Caption]:
            generator = self.connect()
            with self._serve(adapters) as model:
                generator.client.use_model(model)
                return self._sample(generator, clips, sampling, name=name, seed=seed, partial=partial, on_part=on_part)

        captions = load_or_create(folder / CAPTIONS_NAME, Caption, sample_all)
        if dist.is_main():
            shutil.rmtree(partial, ignore_errors=True)
        return captions

    def _sample(
        self,
        generator: ServerCaptioner,
        clips: ClipSet,
        sampling: SampleConfig,
        *,
        name: str,
        seed: int,
        partial: Path,
        on_part: Callable[[Sequence[Caption]], object] | None,
    ) -> list[Caption]:
        references = clips.references
        parts = CaptionParts(
            partial,
            {
                "model": generator.client.config.model.replace(self._run, "run"),  # which a moved run keeps
                "input": generator.input,
                "frame_format": self.config.server_frame_format,
                "parameters": self.config.server_parameters,
                "prompt": self._processor.config.default_prompt("both"),
                "sampling": asdict(sampling),
                "seed": seed,
                "clips": [reference.video for reference in references],
            },
        )
        finished = parts.find_finished()
        shares = dist.balance([0 if index in finished else 1 for index in range(len(references))])
        mine = shares[dist.rank()]
        todo = [index for index in mine if index not in finished]
        if on_part:
            for index in finished.intersection(mine):
                on_part(parts.read(index))
        failures = list[str]()
        bar = tqdm(total=len(mine), initial=len(mine) - len(todo), desc=name, unit="clip", disable=not dist.is_main())
        with ClipReader(workers=self.config.workers) as reader, bar:
            for index, result in self._answer_clips(generator, clips, todo, sampling, seed=seed, reader=reader):
                bar.update()
                if isinstance(result, Failure):
                    failures.append(result.reason)
                else:
                    parts.write(index, result)
                    if on_part:
                        on_part(result)
        if failed := [reason for reasons in dist.gather([failures]) for reason in reasons]:
            raise ValueError(
                f"{name}: the server does not caption {len(failed)} of {len(references)} clips, first {failed[0]}; the "
                "captions of the others are kept: raise the server's limits, or leave these clips out of the references"
            )
        groups = dist.gather_balanced([parts.read(index) for index in mine], shares)
        return [caption for captions in groups for caption in captions]

    def _answer_clips(
        self,
        generator: ServerCaptioner,
        clips: ClipSet,
        indices: Sequence[int],
        sampling: SampleConfig,
        *,
        seed: int,
        reader: ClipReader,
    ) -> Iterator[tuple[int, list[Caption] | Failure]]:
        """Yield the captions of each clip, in the order of the samples, as soon as all its requests are answered."""
        config, temperatures = self._processor.config, sampling.shares()
        size = sampling.num_samples // len(temperatures)
        asked = [(index, share) for index in indices for share in range(len(temperatures))]
        penalty = sampling.repetition_penalty
        if not generator.is_own and penalty is None and config.repetition_penalty != 1:
            penalty = config.repetition_penalty  # the model's own, which other servers may not have
        requests = (
            CaptionRequest(
                clips.root / clips.references[index].video,
                config.default_prompt("both"),
                replace(
                    sampling,
                    temperature=temperatures[share],
                    temperatures=None,
                    repetition_penalty=penalty,
                ),
                modality=self._modality,
                seed=seed * 1_000_003 + index + share * _SHARE_SEED_STEP,
                num_samples=size,
                system=None if generator.is_own else config.system_prompt or None,
            )
            for index, share in asked
        )
        answers: dict[int, dict[int, list[Caption]]] = {index: {} for index in indices}
        for number, result in generator.generate_each(requests, reader=reader):
            index, share = asked[number]
            if isinstance(result, Failure):
                if answers.pop(index, None) is not None:  # once for each clip
                    yield index, result
                continue
            video = clips.references[index].video
            captions = [replace(one, video=video, sample=share * size + one.sample) for one in result]
            if index in answers:
                answers[index][share] = captions
                if len(answers[index]) == len(temperatures):
                    found = answers.pop(index)
                    yield index, [caption for number in sorted(found) for caption in found[number]]

    @contextmanager
    def _serve(self, adapters: Sequence[Path]) -> Iterator[str]:
        """Let the server have the sum of the adapters, and yield the name of the model with it.

        However the context ends, rank 0 unloads and deletes the sum.
        """
        assert self.config.server_model
        if not adapters:
            yield self.config.server_model
            return
        digest = hashlib.sha256()
        for adapter in adapters:
            digest.update((adapter / ADAPTER_WEIGHTS_NAME).read_bytes())
        name = f"{self._run}-{adapters[-1].parent.name}-{digest.hexdigest()[:8]}"
        if not self._loader:  # on other ranks
            yield dist.gather([""])[0]
            dist.barrier()
            return
        with self._temporary_folder() as temporary:
            stacked = stack_adapters(adapters, temporary / "stacked", max_rank=self.config.max_rank)
            self._publish(temporary / "stacked", self._folder / name)
        if stacked.error:
            log.warning(
                "%s has rank %d, less than all rounds together; the difference is %.2f %% of the norm of their sum",
                name,
                stacked.rank,
                100 * stacked.error,
            )
        with self._loaded(self._loader, name, rank=stacked.rank) as model:
            yield dist.gather([model])[0]
            dist.barrier()

    @contextmanager
    def _loaded(self, loader: AdapterLoader, name: str, *, rank: int) -> Iterator[str]:
        """Load a published adapter and yield the name of the model with it; unload and delete it in any case."""
        try:
            model = loader.load(name, self._folder / name, rank=rank)
            try:
                yield model
            finally:
                loader.unload(name)
        finally:
            shutil.rmtree(self._folder / name, ignore_errors=True)

    @property
    def _modality(self) -> Modality:
        """What the model is given of a clip."""
        return "both" if self._processor.family.hears else "visual"

    @contextmanager
    def _temporary_folder(self) -> Iterator[Path]:
        """Yield a folder next to the adapters, as they may be larger than /tmp; that of a killed process is deleted."""
        folder = self._folder / f".{self._run}.tmp"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def _publish(self, adapter: Path, folder: Path) -> None:
        """Write an adapter in a temporary folder to the one that the server reads, with its model's names of weights.

        Raises:
            ValueError: these names are not known.
        """
        base = self.config.base or self._model
        shutil.rmtree(folder, ignore_errors=True)
        if self._is_own:
            adapter.replace(folder)
            return
        if is_own_layout(base):
            raise ValueError(
                f"the names that the weights of {base} have on the server are not known; pass the checkpoint that "
                "the server runs as --sampler.base"
            )
        renamed = adapter.with_name(f"{adapter.name}.renamed")
        with atomic_folder(renamed) as unfinished:
            write_adapter(adapter, unfinished, base=base)
        renamed.replace(folder)

    def _test_adapters(self, generator: ServerCaptioner, loader: AdapterLoader) -> None:
        """Test that the server takes an adapter of the largest rank of the run, and that its answers change.

        A server may ignore adapters whose modules have other names than its own.

        Raises:
            ValueError: it does not.
        """
        name = f"{self._run}-test"
        with self._temporary_folder() as folder:
            network = build_on_meta(self._processor.config)
            write_random_adapter(network, self._lora, folder / "random", rank=self._max_rank)
            self._publish(folder / "random", self._folder / name)
            clip, _ = write_probe_clips(folder)
            with self._loaded(loader, name, rank=self._max_rank) as model:
                if not loader.is_sglang and not generator.is_own and self._max_rank > VLLM_MAX_RANKS[-1]:
                    raise ValueError(
                        f"the run needs an adapter of rank {self._max_rank}, the sum of its rounds, and vLLM's "
                        f"--max-lora-rank is at most {VLLM_MAX_RANKS[-1]}; use fewer rounds, a smaller lora.rank, or "
                        f"--sampler.max-rank {VLLM_MAX_RANKS[-1]}, which approximates the sum"
                    )
                answers = []
                sampling = Sampling(max_new_tokens=_PROBE_TOKENS, logprobs=0)
                request = CaptionRequest(clip, "Describe it.", sampling, modality=self._modality)
                generator.accepts_empty = True
                for one in (loader.base_name, model):
                    generator.client.use_model(one)
                    ((caption,),) = generator.generate([request])
                    answers.append((caption.text, caption.logprob))
                generator.client.use_model(loader.base_name)
        if answers[0] == answers[1]:
            raise ValueError(
                f"{generator.client.address} gives the same answer with and without an adapter "
                f"({answers[0][0][:80]!r}): it ignores the adapter, probably because its modules have other names; "
                "pass the checkpoint that the server runs as --sampler.base"
            )


class CaptionParts:
    """The captions of finished clips in a folder, one file for each, while others are sampled.

    Args:
        folder: the folder.
        request: JSON object that the captions follow from; those of another one are deleted.
    """

    def __init__(self, folder: Path, request: Mapping[str, object]) -> None:
        self._folder = folder
        path = folder / _REQUEST_NAME
        if dist.is_main():  # only rank 0 looks, as NFS shows files late
            request = json.loads(json.dumps(request))  # with lists for tuples, as in the file
            if folder.is_dir() and not (path.is_file() and read_json(path) == request):
                log.warning(
                    "%s contains captions of other clips, or from another model or config; sampling again", folder
                )
                shutil.rmtree(folder)
            write_json(path, request)

    def find_finished(self) -> set[int]:
        """Return the indices of the finished clips, on all ranks, as rank 0 finds them."""
        files = self._folder.glob("clip_*.jsonl") if dist.is_main() else ()
        return dist.gather([{int(path.stem.removeprefix("clip_")) for path in files}])[0]

    def write(self, index: int, captions: Sequence[Caption]) -> None:
        """Write the captions of a clip."""
        write_records(self._path(index), captions)

    def read(self, index: int) -> list[Caption]:
        """Read the captions of a clip."""
        return read_records(self._path(index), Caption)

    def _path(self, index: int) -> Path:
        return self._folder / f"clip_{index:06d}.jsonl"


def _with_own_flags(message: str) -> str:
    """Replace flags of `salmonn caption` in a message by those of a run."""
    names = "|".join(_OPTIONS)
    return re.sub(rf"--({names})\b", r"--sampler.\1", message).replace(
        ", caption without sound (--modality visual)", ""
    )
