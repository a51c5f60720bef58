"""The policy table inside engines that people run: `vllm`, and the rules it shares with no engine, `holding`."""
