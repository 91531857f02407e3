"""Hidden states between two neighbouring stages over `mx.distributed`, in a helper process that can be killed."""
