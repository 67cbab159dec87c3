"""What can be asked of each command: one dataclass a command, made of shared groups. Importing them takes no torch.

A field is an option: `chunk_rows` is `--chunk-rows` on the line, and `chunk-rows` or `chunk_rows` in a YAML file. Its
annotation is its type, the docstring below it its help. A class is a heading of the help: a shared group's docstring
is the heading, a command's docstring the text above all options.
"""
