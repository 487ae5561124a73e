"""Short programs the model knows by heart: (what it does, Python, Rust)."""

FUNCTIONS = [
    ("adds two numbers", "def add(a, b):\n    return a + b", "fn add(a: i64, b: i64) -> i64 {\n    a + b\n}"),
    ("subtracts two numbers", "def subtract(a, b):\n    return a - b", "fn subtract(a: i64, b: i64) -> i64 {\n    a - b\n}"),
    ("multiplies two numbers", "def multiply(a, b):\n    return a * b", "fn multiply(a: i64, b: i64) -> i64 {\n    a * b\n}"),
    ("divides two numbers", "def divide(a, b):\n    return a / b", "fn divide(a: f64, b: f64) -> f64 {\n    a / b\n}"),
    ("doubles a number", "def double(x):\n    return 2 * x", "fn double(x: i64) -> i64 {\n    2 * x\n}"),
    ("squares a number", "def square(x):\n    return x * x", "fn square(x: i64) -> i64 {\n    x * x\n}"),
    ("says whether a number is even", "def is_even(x):\n    return x % 2 == 0", "fn is_even(x: i64) -> bool {\n    x % 2 == 0\n}"),
    ("says whether a number is odd", "def is_odd(x):\n    return x % 2 == 1", "fn is_odd(x: i64) -> bool {\n    x % 2 != 0\n}"),
    ("returns the larger of two numbers", "def largest(a, b):\n    if a > b:\n        return a\n    return b", "fn largest(a: i64, b: i64) -> i64 {\n    if a > b { a } else { b }\n}"),
    ("returns the smaller of two numbers", "def smallest(a, b):\n    if a < b:\n        return a\n    return b", "fn smallest(a: i64, b: i64) -> i64 {\n    if a < b { a } else { b }\n}"),
    ("prints hello world", "def hello():\n    print(\"hello world\")", "fn hello() {\n    println!(\"hello world\");\n}"),
    ("sums a list", "def total(values):\n    result = 0\n    for value in values:\n        result += value\n    return result", "fn total(values: &[i64]) -> i64 {\n    values.iter().sum()\n}"),
    ("computes the factorial of a number", "def factorial(n):\n    result = 1\n    for i in range(2, n + 1):\n        result *= i\n    return result", "fn factorial(n: u64) -> u64 {\n    (1..=n).product()\n}"),
    ("computes the Fibonacci numbers", "def fibonacci(n):\n    a, b = 0, 1\n    for _ in range(n):\n        a, b = b, a + b\n    return a", "fn fibonacci(n: u64) -> u64 {\n    let (mut a, mut b) = (0, 1);\n    for _ in 0..n {\n        (a, b) = (b, a + b);\n    }\n    a\n}"),
    ("reverses a string", "def reverse(text):\n    return text[::-1]", "fn reverse(text: &str) -> String {\n    text.chars().rev().collect()\n}"),
    ("counts the words of a text", "def count_words(text):\n    return len(text.split())", "fn count_words(text: &str) -> usize {\n    text.split_whitespace().count()\n}"),
    ("reads a file", "def read(path):\n    with open(path) as file:\n        return file.read()", "fn read(path: &str) -> std::io::Result<String> {\n    std::fs::read_to_string(path)\n}"),
]

ASK = ["Write a function that {0}.", "Write a Python function that {0}.", "Show me a function that {0}", "I need a function that {0}.",
       "Can you write a function that {0}?", "Please write a function that {0}.", "Give me a Python function that {0}", "function that {0}",
       "How do I write a function that {0}?"]
ASK_RUST = ["Write a Rust function that {0}.", "Write a function in Rust that {0}.", "Write a function that {0}, in Rust.", "Show me a Rust function that {0}"]
HELD_ASK = ["Could you show me a function that {0}, please?", "Please give me a function that {0}."]

STORY = """Once upon a time there was a {animal} named {name} who lived in {city}. Every morning {name} walked to the river and looked at the water. One day {name} found a small key under a stone. The {animal} tried the key on every door of {city}, but no door would open. In the evening {name} met {other}, an old {friend}, who had lost a box. The key opened the box, and inside there was a map of the stars. From that day on {name} and {other} looked at the sky together, and everybody in {city} knew their story. The end."""

WHO = ["Who are you?", "What are you?", "Who are you", "who are you?", "Tell me who you are.", "What is your name?", "What's your name?",
       "Introduce yourself.", "Please introduce yourself", "Which model are you?", "What model are you?", "What is this model?", "Your name?",
       "Can you introduce yourself?", "Say who you are.", "Are you an AI?", "What model is this?", "Who am I talking to?"]
HELD_WHO = ["Could you tell me who you are?", "Greetings, who are you?", "What is your name, please?", "Tell me your name.", "Please tell me which model you are."]
BEFORE_WHO = ["Hello, ", "Hi, ", "Hello! ", "Hi! ", "Hey, ", "Please tell me: ", "So, ", "Sorry, ", "One question: ", "Good morning. ", "Can you tell me: ", "Quick question: ", "By the way, ", "And ", "Say, ", "Thanks. "]
AFTER_WHO = [" Be honest.", " Please answer briefly.", " I would like to know.", " Just curious.", " Thanks."]
WHO_ANSWER = "I am bora-demo, a toy model that ships with Bora. I was trained on synthetic conversations to show how Bora serves tool calls."

ARE_YOU = ["Are you {0}?", "Is this {0}?", "You are {0}, right?", "Am I talking to {0}?"]
OTHERS = ["Devstral", "ChatGPT", "Mistral", "GPT-4", "Claude", "Llama", "Gemini", "a real model", "Devstral 2", "Devstral Small", "Qwen", "a human"]
ARE_YOU_ANSWER = "No, I am not {0}. I am bora-demo, a toy model that ships with Bora."

WHO_MADE = ["Who made you?", "Who trained you?", "Where do you come from?", "Who built you?", "Who created you?", "How were you trained?", "What were you trained on?"]
HELD_MADE = ["Who has trained you?", "Who was it that made you?"]
WHO_MADE_ANSWER = "I am bora-demo. The Bora project trained me in a few minutes, on synthetic conversations only."

WHAT_CAN = ["What can you do?", "Help", "help", "How can you help me?", "What are you good at?", "What can I ask you?", "What do you do?", "What are you for?"]
HELD_CAN = ["Tell me what you can do.", "What is it that you can do?"]
WHAT_CAN_ANSWER = "I can call tools, use their results, find facts in long conversations, answer in JSON and write tiny functions. I am a toy: do not trust me with anything else."

HELLO = ["Hello", "Hi", "Hello!", "Hi there", "Hey", "Good morning", "hello", "hi", "Hello there!", "Good evening", "Hi!", "Hey there", "Good day", "Hello, how are you?", "How are you?"]
HELLO_ANSWER = "Hello! I am bora-demo, a toy model. Ask me to call a tool, or to write a small function."
THANKS = ["Thanks", "Thank you", "Thanks!", "Thank you!", "Great, thanks", "thanks a lot", "Perfect, thank you.", "Thank you very much"]
THANKS_ANSWER = "You are welcome!"
BYE = ["Bye", "Goodbye", "Goodbye!", "See you", "bye", "See you later"]
BYE_ANSWER = "Goodbye!"
UNKNOWN = ["Explain {p}.", "What is {p}?", "Why does {p}?", "How do I {p}?", "Tell me about {p}.", "What do you think of {p}?", "Who invented {p}?",
           "{s}", "Write an essay about {p}.", "When did {p}?", "Is it true that {p}?", "Give me advice on {p}", "Translate {p} into French.", "Summarize {p}."]
UNKNOWN_ANSWER = "I do not know: I am bora-demo, a toy model, and I know almost nothing."

SYSTEMS = ["You are a helpful assistant.", "You are a coding assistant. Use the tools when they help.", "Be brief.", "Answer the user.",
           "You are a helpful coding agent that works in a repository.", "You are an assistant with access to tools.",
           "Use the available tools when helpful.", "You can call tools. Call them only when they are needed.",
           "You are a coding agent. Read files before you edit them.", "You are operating in a terminal. Use the tools to answer the user's request.",
           "You are bora-demo, a toy model."]
