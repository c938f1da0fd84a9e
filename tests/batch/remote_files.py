"""Archives, and the videos that paths and URLs stand for, listed and fetched."""

import io
import tarfile

from salmonn.batch import remote
from salmonn.batch.discovery import VideoFile, VideoListing
from salmonn.batch.fetch import FetchConfig, Fetcher
from salmonn.records import Failure


def tar_of(members: dict[str, bytes]) -> bytes:
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w") as archive:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return data.getvalue()


def listed(*paths, **options) -> list[VideoFile | Failure]:
    return list(VideoListing(paths, **options).videos())


def fetched(*paths, **options) -> dict[str, bytes | str]:
    """Fetch the videos that paths stand for; return the contents, or the reason of a failure."""
    found = {}
    with Fetcher(FetchConfig(**options)) as fetcher:
        for _, video, path in fetcher.ahead(enumerate(listed(*paths))):
            found[video.path] = path.read_bytes() if path.exists() else fetcher.explain(video, "no reason")
            fetcher.release(video)
            assert not path.exists() or not remote.is_url(video.path)
    return found
