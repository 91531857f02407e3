"""The terminal chat talks to the servers that the tests of `serve` make."""

from tests.serve.conftest import app_of, live, live_server, make_voice, saying, thinker, voice

__all__ = ["app_of", "live", "live_server", "make_voice", "saying", "thinker", "voice"]
