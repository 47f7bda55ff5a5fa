"""Videos in and out: each frame is segmented, and the overlays become a video of the same rate."""

from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from iccld.durable import make_folder, replacing
from iccld.inference.files import LEGEND, Segment, UnusableFile
from iccld.inference.pictures import legend, save_picture
from iccld.inference.prediction import Prediction
from iccld.inference.progress import counted
from iccld.reading import open_plain

if TYPE_CHECKING:
    import av.container

NO_OTHER_FILES = {"protocol_whitelist": "none"}
"""Options of FFmpeg: a list of other files and addresses (ffconcat, HLS) opens none of them."""
VIDEO_SUFFIXES = (".avi", ".m4v", ".mkv", ".mov", ".mp4", ".webm")


def is_video(path: Path) -> bool:
    """Tell whether a file's name ends as a video's does."""
    return path.suffix.lower() in VIDEO_SUFFIXES and path.is_file()


def predict_video(source: Path, output: Path, segment: Segment) -> Path:
    """Write the overlays of a video as H.264 in an MP4, and return its path; sound is left out.

    output: the file, ending in .mp4, or a folder, which gets `<stem>_overlay.mp4` and `legend.png`. Frames have an
    even number of rows and columns: a last odd one is left out. A frame's noise is keyed by its number. Raises
    ValueError where the source is no video, ModuleNotFoundError without PyAV.
    """
    import av
    import av.error

    is_file = output.suffix.lower() == ".mp4"
    target = output if is_file else output / f"{source.stem}_overlay.mp4"
    if target.exists() and target.samefile(source):
        raise ValueError(f"predict: {target} is the input and would be overwritten; give another output.")
    make_folder(target.parent, within=target.parent)
    try:
        with (
            open_plain(source) as content,  # a path such as `concat:a.mp4` would be a URL
            av.open(content, "r", options=NO_OTHER_FILES) as video,
            replacing(target, durably=False) as file,
        ):
            if not video.streams.video:
                raise ValueError(f"predict: {source} has no picture; give a video.")
            with av.open(file, "w", format="mp4") as written:
                prediction = _write_frames(video, written, segment)
    except av.error.FFmpegError as error:
        raise UnusableFile(source, f"it cannot be read as a video ({error.strerror})") from error
    if not is_file:
        save_picture(legend(prediction.names, prediction.colours), output / LEGEND)
    return target


def _write_frames(
    video: "av.container.InputContainer", written: "av.container.OutputContainer", segment: Segment
) -> Prediction:
    """Encode the overlay of each frame; return the last prediction."""
    from av import VideoFrame

    stream, out, prediction = video.streams.video[0], None, None
    frames = counted(_frames(video), stream.frames or None)
    for number, image in enumerate(frames):
        prediction = segment(image, number)
        picture = np.asarray(prediction.overlay())
        if out is None:
            out = written.add_stream("libx264", rate=stream.average_rate or Fraction(25))
            out.height, out.width, out.pix_fmt = *picture.shape[:2], "yuv420p"
        written.mux(out.encode(VideoFrame.from_ndarray(picture)))
    if out is None or prediction is None:
        raise ValueError("predict: the video has no frame that can be decoded; give another.")
    written.mux(out.encode(None))
    return prediction


def _frames(video: "av.container.InputContainer") -> Iterator[np.ndarray]:
    """Yield frames `(H, W, 3)` uint8, upright, with even sides."""
    for frame in video.decode(video=0):
        image = np.rot90(frame.to_ndarray(format="rgb24"), round(frame.rotation / 90) % 4)
        yield np.ascontiguousarray(image[: image.shape[0] // 2 * 2, : image.shape[1] // 2 * 2])
