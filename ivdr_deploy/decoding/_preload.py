"""What the server process of the decode workers loads once, so that a worker is ready when it is forked."""

import av  # noqa: F401, TID253
import numpy  # noqa: F401

import ivdr_deploy.video._pyav  # noqa: F401
