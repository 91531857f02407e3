"""Which experts a workload asks for: traces, made-up ones, what any cache could reach, and replays."""
