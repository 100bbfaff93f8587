"""A stand-in; see `_inert`."""

from _inert import stand_in

stand_in(__name__)
