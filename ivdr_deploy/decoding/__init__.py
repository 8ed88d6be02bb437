"""The decode stage: a pool of workers over ``video.clips``, with one failure policy for all that read videos."""

from ivdr_deploy.decoding._worker import ScratchError, end_with
from ivdr_deploy.decoding.pool import GRACE_SECONDS, DecodeOptions, DecodePool
from ivdr_deploy.decoding.stream import DecodeStream

__all__ = ["GRACE_SECONDS", "DecodeOptions", "DecodePool", "DecodeStream", "ScratchError", "end_with"]
