"""Our model, plan and preload hook inside legacy exo (0.0.15-alpha), bound by name after a check of signatures."""
