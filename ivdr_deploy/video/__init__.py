"""From an encoded video to the uint8 clips a network takes: written once, used everywhere."""

from ivdr_deploy.video.clips import Clips, load_clips, open_frames
from ivdr_deploy.video.decode import open_video
from ivdr_deploy.video.reader import VideoInfo, VideoLimits, VideoReader
from ivdr_deploy.video.source import BytesSource, PathSource, Source, VideoSource, as_source

__all__ = [
    "BytesSource",
    "Clips",
    "PathSource",
    "Source",
    "VideoInfo",
    "VideoLimits",
    "VideoReader",
    "VideoSource",
    "as_source",
    "load_clips",
    "open_frames",
    "open_video",
]
