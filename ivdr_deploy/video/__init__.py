"""From an encoded video to the uint8 clips a network takes: written once, used everywhere."""

from ivdr_deploy.video.clips import Clips, load_clips, load_frames
from ivdr_deploy.video.decode import open_video
from ivdr_deploy.video.reader import VideoInfo, VideoLimits, VideoReader

__all__ = ["Clips", "VideoInfo", "VideoLimits", "VideoReader", "load_clips", "load_frames", "open_video"]
