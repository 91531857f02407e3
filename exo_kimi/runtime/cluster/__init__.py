"""The leader's hands: stages are started, connected, watched and restarted here."""
