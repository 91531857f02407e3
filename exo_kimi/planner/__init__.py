"""Where the layers go: a Question of model, machines and work, its exact Answer, plan files and their pictures."""
