"""placeholder"""


class PeerLost(RuntimeError):
    """Another process of the run is gone."""
