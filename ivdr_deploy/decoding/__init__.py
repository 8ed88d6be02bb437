"""The decode stage: a pool of workers over ``video.clips``, with one failure policy for all that read videos."""

from ivdr_deploy.decoding._worker import ScratchError
from ivdr_deploy.decoding.pool import DecodeOptions, DecodePool
from ivdr_deploy.decoding.stream import DecodeStream

__all__ = ["DecodeOptions", "DecodePool", "DecodeStream", "ScratchError"]
