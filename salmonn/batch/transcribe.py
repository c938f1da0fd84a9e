"""The loop of `salmonn transcribe`: audio is read ahead by worker processes, and a broken file affects only itself."""

from collections.abc import Generator, Iterable, Iterator

from salmonn.batch.discovery import VideoFile, path_number
from salmonn.batch.fetch import Fetcher
from salmonn.batch.job import IndexedVideo, VideoResult, stamp
from salmonn.batch.transcripts import Transcript
from salmonn.caption.generator import CaptionRequest
from salmonn.caption.loader import ClipJob, ClipReader
from salmonn.caption.read_spec import AudioReadSpec
from salmonn.caption.transcribe import Transcriber, Transcription
from salmonn.media.clip import Clip
from salmonn.records import Failure

NO_AUDIO = "the file has no audio"


def transcribe_videos(
    transcriber: Transcriber, videos: Iterable[IndexedVideo], *, reader: ClipReader, fetcher: Fetcher | None = None
) -> Generator[VideoResult]:
    """Transcribe videos in the order given.

    Args:
        transcriber: the speech recognizer.
        videos: any number of videos.
        reader: reads audio ahead of the model.
        fetcher: fetches remote files ahead of the reader; needed if there are any.
    """
    fetcher = fetcher or Fetcher()
    started: dict[int, IndexedVideo] = {}

    def jobs() -> Iterator[ClipJob]:
        for number, (index, video, path) in enumerate(fetcher.ahead(videos)):
            started[number] = (index, video)
            yield ClipJob(number, CaptionRequest(path, modality="audio"), AudioReadSpec())

    for batch in reader.batches(jobs(), size=1, finish=lambda clip: clip):
        for job, clip in batch:
            index, video = started.pop(job.index)
            result = stamp(_transcribe(transcriber, video, clip), video, fetcher)
            fetcher.release(video)
            yield VideoResult(index, video, (result,))


def _transcribe(transcriber: Transcriber, video: VideoFile, clip: Clip | ValueError) -> Transcript | Failure:
    if isinstance(clip, ValueError):
        return Failure(video.path, str(clip), "read")
    found = Transcription(warnings=(NO_AUDIO,))
    try:
        if clip.waveform is not None:
            found = transcriber.transcribe(clip.waveform, seed=path_number(video.path))
    except RuntimeError as error:  # out of memory is one
        cause = str(error).partition("\n")[0]
        reason = f"{video.path}: the speech recognizer failed ({cause}); with little memory, use a smaller model"
        return Failure(video.path, reason, "caption")
    return Transcript(
        video.path,
        " ".join(one.text for one in found.speech),
        model=transcriber.name,
        complete=clip.is_complete,
        modality="audio",
        warnings=(*clip.warnings, *found.warnings),
        speech=found.speech,
        language=found.language,
        has_audio=clip.has_audio,
    )
