"""The subcommands of `octavo`: each a module here, of the name that is typed.

Such a module has

    def add_flags(parser: OneLineParser) -> None: ...
    def run(flags: argparse.Namespace) -> None: ...

`run` prints on stdout what was asked for, and raises an `OctavoError` where the user can mend something. Besides what
the flags say, `flags.words` holds the words behind the subcommand as they were typed. A module is imported when its
name is typed, and only then, so that `octavo --help` waits for none of them.
"""

COMMANDS = {
    "convert": "quantize a model: linears, KV cache and attention",
    "run": "continue a text with a converted model, or with any and --scheme",
    "chat": "talk with a converted model, or with any and --scheme",
    "info": "say what a directory or hub id holds, and what can be done with it",
    "schemes": "list how K and V can be stored, and when to choose which",
    "presets": "list sets of flags of a conversion by name, and what each is for",
    "plan": "say what memory a model takes with each scheme, and what fits",
    "evaluate": "measure what quantization costs: on text, in recall, in time",
    "compare": "measure many schemes and presets, and lay them out on a page",
    "search": "choose bits for each layer, K and V apart, under a budget",
    "serve": "answer OpenAI's clients, a converted model or any with --scheme",
    "doctor": "say by weights which schemes a model bears, or measure and choose",
    "rewrite": "write a converted directory in the format of an engine",
    "refresh": "put today's code into a directory that an older version converted",
}
"""What each is for, in the order in which `octavo --help` lists them."""
