"""Draft heads on disk: their tensors under the names of `arch.draft_modules`, and the vocabulary that they draft from."""
