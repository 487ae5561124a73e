"""Random tool schemas, the words people use to ask for them, and the arguments of a call."""

import json

import values
from words import CITIES, FILLER, HELD_CITIES, HELD_NAMES, HELD_NOUNS, HELD_VERBS, NAMES, NOUNS, RESERVED, VERBS


def city(rng, held):
    if not held and rng.random() < 0.3:
        return values.strange(rng).capitalize()
    return rng.choice(HELD_CITIES if held else CITIES)


def person(rng, held):
    if not held and rng.random() < 0.4:
        return values.strange(rng).capitalize()
    return rng.choice(HELD_NAMES if held else NAMES)


def date(rng):
    return f"20{rng.randint(10, 39)}-{rng.randint(1, 12):02}-{rng.randint(1, 28):02}"


CHOICES = ["celsius fahrenheit", "json csv xml", "low normal high", "debug info warn error", "ascending descending",
           "small medium large", "red green blue", "day week month year", "north south east west", "draft final",
           "open closed pending", "metric imperial", "png jpg gif", "private public"]

# kind: (parameter names, JSON type, description, value)
KINDS = {
    "path": ("path file_path file source destination target filename input output", "string", "Path of the file.", lambda r, h: values.path(r)),
    "folder": ("folder directory dir root cwd", "string", "The directory.", lambda r, h: values.folder(r)),
    "code": ("id key token code reference serial tag number hash branch label version", "string", "The identifier.", lambda r, h: values.code(r)),
    "phrase": ("title text message subject body query content note comment summary pattern question", "string", "The text.", lambda r, h: values.phrase(r)),
    "word": ("name topic category type group channel keyword symbol user", "string", "The name.", lambda r, h: values.word(r)),
    "city": ("city location place town origin", "string", "Name of the city.", city),
    "person": ("person author owner recipient assignee customer contact", "string", "Name of the person.", person),
    "email": ("email address to sender", "string", "An email address.", lambda r, h: f"{values.word(r)}@{values.invented(r)}.{r.choice(['com', 'org', 'net', 'io'])}"),
    "url": ("url link endpoint", "string", "The address.", lambda r, h: f"https://{values.invented(r)}.{r.choice(['com', 'org', 'net'])}/{values.word(r)}"),
    "date": ("date day start end due deadline", "string", "A date as YYYY-MM-DD.", lambda r, h: date(r)),
    "time": ("time at hour", "string", "A time of day.", lambda r, h: f"{r.randint(0, 23):02}:{r.randint(0, 59):02}"),
    "integer": ("count limit offset page size port timeout width height quantity lines amount days minutes a b x y seed", "integer", "How many.", lambda r, h: r.choice([r.randint(0, 9), r.randint(0, 99), r.randint(0, 9999)])),
    "number": ("price rate weight score ratio temperature latitude longitude distance factor", "number", "The value.", lambda r, h: round(r.uniform(0, r.choice([1, 10, 100, 1000])), r.randint(1, 3))),
    "boolean": ("recursive force verbose overwrite dry_run urgent quiet enabled", "boolean", "Whether to do so.", lambda r, h: r.random() < 0.5),
}
WEIGHTED = [kind for kind in KINDS for _ in range({"integer": 3, "path": 3, "code": 3, "phrase": 3, "boolean": 2, "word": 2}.get(kind, 1))]


class Parameter:
    def __init__(self, name, schema, make, required=True):
        self.name, self.schema, self.make, self.required = name, schema, make, required


class Tool:
    """A tool: its name, what people call what it does (`does`), its parameters in order."""

    def __init__(self, name, does, description, parameters, ask=(), held_ask=()):
        self.name, self.does, self.description, self.parameters = name, does, description, parameters
        self.ask, self.held_ask = ask, held_ask  # the ways to ask of a tool that everybody knows
        self.verb = self.noun = None  # of a random tool
        self.strangeness = 0.25  # how often arbitrary words join the name and the value of an argument

    def words(self):
        """The words that mean something in a request for this tool: those of its parameters' names and the choices of its enums."""
        return {word for p in self.parameters for text in (p.name, *p.schema.get("enum", [])) for word in text.split("_")}

    def definition(self):
        schema = {"type": "object", "properties": {p.name: p.schema for p in self.parameters}}
        required = [p.name for p in self.parameters if p.required]
        if required:
            schema["required"] = required
        return {"type": "function", "function": {"name": self.name, "description": self.description, "parameters": schema}}

    def arguments(self, rng, held):
        """The arguments of one call, in the schema's order; optional ones are there half of the time."""
        chosen = [p for p in self.parameters if p.required or rng.random() < 0.5]
        return {p.name: p.make(rng, held) for p in chosen}


def parameter(rng, taken, held):
    while True:
        kind = rng.random()
        if kind < 0.07:
            name, kinds = values.invented(rng), ["code", "integer", "phrase"]
            _, json_type, description, make = KINDS[rng.choice(kinds)]
        elif kind < 0.4 and not held:  # any name may have any kind of value
            name = values.strange(rng) if rng.random() < 0.7 else f"{values.strange(rng)}_{values.strange(rng)}"
            _, json_type, description, make = KINDS[rng.choice(WEIGHTED)]
        elif rng.random() < 0.1:
            options = rng.choice(CHOICES).split()
            name = rng.choice("unit format level order size color mode status kind".split())
            if name in taken:
                continue
            taken.add(name)
            return Parameter(name, {"type": "string", "enum": options, **({"description": "One of the choices."} if rng.random() < 0.5 else {})},
                             lambda r, h, o=options: r.choice(o), rng.random() < 0.7)
        elif rng.random() < 0.06:
            name, make = rng.choice("tags files names items labels ids".split()), None
            if name in taken:
                continue
            taken.add(name)
            item = rng.choice([lambda r: values.word(r), lambda r: values.code(r)])
            return Parameter(name, {"type": "array", "items": {"type": "string"}},
                             lambda r, h, item=item: [item(r) for _ in range(r.randint(1, 3))], True)
        else:
            names, json_type, description, make = KINDS[rng.choice(WEIGHTED)]
            name = rng.choice(names.split())
        if name in taken:
            continue
        taken.add(name)
        schema = {"type": json_type}
        if rng.random() < 0.6:
            schema["description"] = description if rng.random() < 0.6 else values.sentence(rng)
        return Parameter(name, schema, make, rng.random() < 0.8)


def tool_word(rng, listed, share):
    """A word of a tool's name: from the list, or any. Held-out words come only by the list."""
    return rng.choice(listed) if rng.random() < share else values.strange(rng)


PREFIXES = [word for word in FILLER if word not in RESERVED]


def random_tool(rng, held, others=(), likeness=0.4):
    """A tool whose name nobody has seen in this combination; `held` takes the words that training never uses. Where words are not
    held out, it shares its verb or its noun with one of the `others`, so that the whole name tells them apart, as often as `likeness` says;
    above one half, it also takes words that are spelled almost as those of the others, has a prefix oftener, and is asked for in stranger words."""
    verb = tool_word(rng, HELD_VERBS if held else VERBS, 0.8 if held else 0.2)
    noun = tool_word(rng, HELD_NOUNS if held else NOUNS, 0.8 if held else 0.2)
    others = [tool for tool in others if tool.verb]
    if others and not held and rng.random() < likeness:
        other = rng.choice(others)
        verb, noun = (other.verb, noun) if rng.random() < 0.5 else (verb, other.noun)
        if likeness > 0.5 and rng.random() < 0.3:
            verb, noun = (verb, values.near(rng, other.noun)) if verb == other.verb else (values.near(rng, other.verb), noun)
    shared = verb, noun
    if rng.random() < 0.2:
        noun = f"{rng.choice(FILLER) if held else rng.choice(PREFIXES)} {noun}"
    parts = [verb, *noun.split()]
    if rng.random() < 0.15:
        parts = [*parts[1:], verb]
    style = rng.randrange(8)
    name = "_".join(parts) if style < 5 else "-".join(parts) if style == 5 else parts[0] + "".join(p.capitalize() for p in parts[1:])
    if rng.random() < (0.1 if likeness < 0.5 else 0.2):
        name = f"{rng.choice(['fs', 'api', 'db', 'my', 'app', 'mcp'])}_{name}"
    elif not held and rng.random() < 0.08:
        name = f"{values.strange(rng)}_{name}"
    article = "an" if noun[0] in "aeiou" else "a"
    description = rng.choice([f"{verb.capitalize()} {article} {noun}.", f"{verb.capitalize()} the {noun}.", f"Use this to {verb} {article} {noun}.",
                              f"This tool can {verb} {article} {noun}.", f"{verb.capitalize()}s {noun}s.", ""])
    if rng.random() < 0.12:
        description += (" " if description else "") + values.page(rng, rng.choice([1, 2, 4, 8]))
    taken = set()
    parameters = [parameter(rng, taken, held) for _ in range(rng.choice([0, 1, 1, 1, 2, 2, 2, 3, 3, 4]))]
    tool = Tool(name, f"{verb} the {noun}", description, parameters)
    tool.verb, tool.noun = shared
    tool.strangeness = 0.25 if likeness < 0.5 else 0.5
    return tool


def fixed(name, kind, required=True, names=None):
    _, json_type, description, make = KINDS[kind]
    return Parameter(name, {"type": json_type, "description": description}, make, required)


def known_tools(rng):
    """Tools that coding agents have, under the names they usually have there; asked for in plain words."""
    command = Parameter("command", {"type": "string", "description": "The shell command to run."}, lambda r, h: values.command(r))
    tools = [
        Tool(rng.choice(["read_file", "read", "open_file", "view_file"]), "read the file", "Read a file.", [fixed("path", "path")],
             ["Read {path}", "Read the file {path}", "Show me {path}", "What is in {path}?", "What does {path} say?", "Open {path}", "Print the file {path}", "Please read {path}.", "Look at {path}"],
             ["Can you read {path} for me?", "Let me see {path}"]),
        Tool(rng.choice(["write_file", "create_file", "save_file"]), "write the file", "Write a file.", [fixed("path", "path"), fixed("content", "phrase")],
             ["Write {content!} to {path}", "Create the file {path} with the content {content!}", "Put {content!} into {path}", "Save {content!} as {path}", "Make a file {path} that says {content!}"],
             ["Store {content!} in {path}"]),
        Tool(rng.choice(["bash", "shell", "terminal", "run_command"]), "run the command", "Run a shell command.", [command],
             ["Run {command!}", "Run the command {command!}", "Execute {command!}", "Please run {command!}", "In the shell: {command!}"],
             ["Could you execute {command!} now?"]),
        Tool(rng.choice(["grep", "search", "search_files", "find_in_files"]), "search the files", "Search files for a pattern.",
             [Parameter("pattern", {"type": "string", "description": "What to search for."}, lambda r, h: values.word(r)), fixed("path", "folder")],
             ["Search for {pattern!} in {path}", "Find {pattern!} in {path}", "Where is {pattern!} used in {path}?", "Grep {path} for {pattern!}", "Which files in {path} contain {pattern!}?"],
             ["Look for {pattern!} under {path}"]),
        Tool(rng.choice(["list_files", "list_dir", "ls", "list_directory"]), "list the files", "List the files of a directory.", [fixed("path", "folder")],
             ["List the files in {path}", "What files are in {path}?", "List {path}", "Show the contents of the folder {path}", "Which files does {path} have?"],
             ["Give me the listing of {path}"]),
        Tool(rng.choice(["get_weather", "weather", "get_current_weather", "current_weather"]), "get the weather", "Get the weather of a city.",
             [fixed(rng.choice(["city", "location"]), "city")],
             ["What is the weather in {0}?", "How is the weather in {0}?", "What's the weather like in {0} today?", "Tell me the weather in {0}.", "Weather in {0}?", "Is it raining in {0}?", "How warm is it in {0}?"],
             ["Do I need an umbrella in {0}?", "Give me the weather for {0}"]),
        Tool(rng.choice(["add", "add_numbers", "sum", "add_number"]), "add the numbers", "Add two numbers.", [fixed("a", "integer"), fixed("b", "integer")],
             ["What is {a} + {b}?", "Add {a} and {b}", "What is {a} plus {b}?", "Compute {a} + {b}", "How much is {a} and {b} together?", "Sum up {a} and {b}"],
             ["Please calculate {a} plus {b}"]),
        Tool(rng.choice(["multiply", "multiply_numbers", "product"]), "multiply the numbers", "Multiply two numbers.", [fixed("a", "integer"), fixed("b", "integer")],
             ["What is {a} * {b}?", "Multiply {a} by {b}", "What is {a} times {b}?", "Compute {a} * {b}"], ["Please calculate {a} times {b}"]),
        Tool(rng.choice(["send_email", "send_mail", "email"]), "send the email", "Send an email.", [fixed("to", "email"), fixed("subject", "phrase"), fixed("body", "phrase")],
             ["Send an email to {to} with the subject {subject!} and the text {body!}", "Write an email to {to}: subject {subject!}, body {body!}", "Email {to} about {subject!}: {body!}"],
             ["Mail {to}, subject {subject!}, saying {body!}"]),
        Tool(rng.choice(["get_time", "current_time", "get_current_time"]), "get the time", "Get the time in a city.", [fixed("city", "city")],
             ["What time is it in {0}?", "Tell me the time in {0}.", "What is the time in {0} now?"], ["How late is it in {0}?"]),
        Tool(rng.choice(["web_search", "search_web", "internet_search"]), "search the web", "Search the web.", [fixed("query", "phrase")],
             ["Search the web for {query!}", "Look up {query!} on the internet", "Find {query!} online"], ["Do a web search for {query!}"]),
    ]
    for tool in tools:  # descriptions differ between agents
        if rng.random() < 0.3:
            tool.description = rng.choice(["", tool.description + " " + values.paragraph(rng, rng.randint(1, 5)), f"Tool to {tool.does}."])
        if rng.random() < 0.2:
            tool.parameters.append(fixed(rng.choice(["timeout", "limit", "offset", "max_lines"]), "integer", required=False))
    return tools


def quoted(rng, text):
    quote = rng.choice("\"'`") if "\n" not in text else "`"
    return text if quote in text else f"{quote}{text}{quote}"


def spoken_value(rng, value, kind_needs_quotes=False):
    if isinstance(value, bool):
        return rng.choice(["true", "yes", "on"] if value else ["false", "no", "off"]) if rng.random() < 0.3 else str(value).lower()
    if isinstance(value, list):
        return ", ".join(value) if len(value) < 2 else ", ".join(value[:-1]) + " and " + value[-1]
    if not isinstance(value, str):
        return json.dumps(value)
    if " " in value or kind_needs_quotes or rng.random() < 0.25:
        return quoted(rng, value)
    return value


COMMON = ["{n} {v}", "{n} {v}", "{n}={v}", "{n}: {v}", "the {n} {v}", "{n} set to {v}", "{n} is {v}"]
SAID = ["{v} as the {n}", "{n} -> {v}", "{n} should be {v}", "{n} must be {v}", "{n} equal to {v}", "{n} of {v}", "{n} := {v}", "use {v} for {n}", "{v} for the {n}",
        "{n} ({v})", "a {n} of {v}", "{n} equals {v}", "{v} as {n}", "--{o} {v}", "{n} will be {v}", "the {n} is {v}", "set {n} to {v}", "the {n} shall be {v}", "{n} => {v}",
        "having {n} {v}", "where {n} is {v}", "{v} ({n})", "{n} at {v}", "{n} as {v}"]
OPENINGS = ["Please ", "please ", "Now ", "Next, ", "Hey, ", "Can you ", "Could you ", "I want you to ", "I need you to ", "You should ", "Let us ", "Ok, ", "Quick: ", "Would you ",
            "We have to ", "It is time to ", "Will you ", "Help me: ", "I'd like you to ", "My task for you: ", "Kindly ", "Just ", "Hello! ", "Hi, ", "I have to ", "Try to "]
ENDINGS = [" please", " for me", " now", ", please", ", thanks", " and tell me the result", ", ok?", " right away", " if you can", " today", " as soon as possible", " again"]


def dressed(rng, text):
    """The request as people say it: with an opening, an ending, or a sentence about something else before it."""
    kind = rng.random()
    if kind < 0.2:
        text = rng.choice(OPENINGS) + text
    elif kind < 0.25:
        text = values.joint(rng, 4) + rng.choice([" ", ", ", ": "]) + text
    elif kind < 0.38:
        text += rng.choice(ENDINGS)
    if rng.random() < 0.08:
        text = f"{values.sentence(rng)} {text}"
    return text


def spoken_argument(rng, name, value, held, tool):
    """One argument of a call of `tool` in words. Arbitrary words are none that name or fill another parameter, and two lists
    of one call both follow their names: else nobody could tell what belongs to what."""
    said = name.replace("_", " ") if rng.random() < 0.7 else name
    text = spoken_value(rng, value)
    forms = SAID + COMMON if rng.random() < 0.5 else COMMON
    if isinstance(value, list) and sum(p.schema["type"] == "array" for p in tool.parameters) > 1:
        forms = [form for form in forms if form.index("{v}") > form.find("{n}") >= 0]
    if held:
        forms = ["{n} being {v}", "whose {n} is {v}", "{n} {v}", "{n} = {v}", "{n}: {v}", "the {n} {v}"]
    elif rng.random() < tool.strangeness:  # any word at all may join a name and its value
        taken = tool.words() | ({"and"} if isinstance(value, list) else set())
        words = values.joint(rng, taken=taken)
        forms = [f"{{n}} {words} {{v}}", f"{{n}} {words} {{v}}", f"{words} {{n}} {{v}}", f"{values.joint(rng, 1, taken)} {{n}} {values.joint(rng, 1, taken)} {{v}}"]
        if not isinstance(value, list):
            forms.append(f"{{v}} {words} {{n}}")
        if isinstance(value, str) and rng.random() < 0.4:
            text = quoted(rng, value)
    return rng.choice(forms).format(n=said, v=text, o=name)


# "What is 2 + 3?" and "What is 2 * 3?", "Tell me the time in Rome." and "Tell me the weather in Rome.", the web and the files
TELLING = frozenset("+ * plus times add multiply together sum weather raining warm time web internet online".split())


def blurred(rng, template):
    """The template with an arbitrary word put in or in the place of another, so that no single word decides what is meant; but a word
    that alone tells one known tool from another stays."""
    words = template.split(" ")
    places = [index for index, word in enumerate(words) if "{" not in word and word.lower() not in TELLING]
    if len(places) > 1 and rng.random() < 0.6:
        words[rng.choice(places)] = values.joint(rng, 1)
    else:
        words.insert(rng.choice([0, 0, rng.randrange(len(words))]), values.joint(rng))
    return " ".join(words)


def request(rng, tool, arguments, held):
    """A sentence that asks for this call, without its final stop."""
    spoken = {p.name for p in tool.parameters}
    known = tool.held_ask if held and tool.held_ask else tool.ask
    if known and (rng.random() < 0.75 or not arguments):
        text = rng.choice(known)
        blur = not held and rng.random() < 0.2
        if blur:
            text = blurred(rng, text)
        first = next(iter(arguments), None)
        for index, (name, value) in enumerate(arguments.items()):
            for mark, quotes in (("{%s!}" % name, True), ("{%s}" % name, False), ("{%d}" % index, False)):
                if mark in text:
                    said = value if isinstance(value, str) else json.dumps(value)
                    if quotes and isinstance(value, str) and (" " in value or blur or rng.random() < 0.5):
                        said = quoted(rng, value)
                    text = text.replace(mark, said)
                    spoken.discard(name)
        rest = [spoken_argument(rng, name, arguments[name], held, tool) for name in arguments if name in spoken]
        assert first is None or "{" not in text or any("{" in str(v) for v in arguments.values()), text
        if not rest:
            return text if held or "?" in text else dressed(rng, text)
        return text.rstrip(".?") + rng.choice([", ", " with ", " and "]) + ", ".join(rest)
    does, name = tool.does, tool.name
    said = [spoken_argument(rng, key, value, held, tool) for key, value in arguments.items()]
    rng.shuffle(said)
    if not said:
        forms = ["{d}", "Please {d}", "use {t}", "Call {t}", "I want you to {d}", "{d} now", "Can you {d}?"]
        return rng.choice(["Could you {d} for me?", "run {t}"] if held else forms).format(d=does, t=name)
    if len(said) == len(tool.parameters) == 1 and rng.random() < 0.35:
        value = spoken_value(rng, next(iter(arguments.values())))
        return rng.choice(["{d} {v}", "Please {d} {v}", "{d}: {v}", "{t} {v}"]).format(d=does, t=name, v=value)
    listed = ", ".join(said) if rng.random() < 0.6 or len(said) < 2 else ", ".join(said[:-1]) + " and " + said[-1]
    forms = ["{d} with {a}", "{d} with {a}", "use {t} with {a}", "Call {t}: {a}", "call {t} with {a}", "{d}, {a}", "{d} using {a}", "run {t} ({a})", "{d} and use {a}",
             "{t}({a})", "{d} ({a})", "With {a}, {d}", "{d}: {a}", "{d}; {a}", "use {t} to {d}: {a}", "invoke {t} with {a}", "the tool {t} should run with {a}", "{d} given {a}"]
    if held:
        forms = ["Could you {d} with {a}?", "go ahead and {d}: {a}", "I would like to {d} with {a}", "Use the tool {t} with {a}"]
    elif rng.random() < 0.6 * tool.strangeness:  # a frame of arbitrary words
        opening = values.joint(rng, 3) + " " if rng.random() < 0.6 else ""
        # before a value that is a plain word, a linking word might be the value itself
        plain = said[0].split(" ")[0] in [v for v in arguments.values() if isinstance(v, str)]
        link = " " + values.joint(rng, 1, tool.words()) + " " if rng.random() < 0.7 and not plain else rng.choice([": ", ", ", " - ", "; "])
        forms = [opening + "{" + rng.choice("ddt") + "}" + link + "{a}" + rng.choice(["", "", "", "?"])]
    text = rng.choice(forms).format(d=does, t=name, a=listed)
    if not held:
        text = dressed(rng, text)
    return text if rng.random() < 0.3 else text[0].upper() + text[1:] if not text.startswith(name) else text
