"""Two tools for loops: files that are written and read, in memory."""

TASK = 'First write "green tree" to notes/a.txt. Then read the file notes/a.txt.'
TASK_CALLS = [[("write_file", {"path": "notes/a.txt", "content": "green tree"})], [("read_file", {"path": "notes/a.txt"})]]


class Files(dict):
    """Call it with a tool's name and arguments: it does what the tool does."""

    def __call__(self, name, arguments):
        if name == "write_file":
            self[arguments["path"]] = arguments["content"]
            return "ok"
        return self.get(arguments["path"], f"error: not found: {arguments['path']}")
