// The console of a Bora router. Everything that a server says is shown as text, never as markup.

const $ = (id) => document.getElementById(id);
const KEY = "bora-api-key";
const POLL_MILLISECONDS = 2000;
const EXAMPLE_TOOLS = [{
  type: "function",
  function: {
    name: "get_weather",
    description: "Get the current weather of a city.",
    parameters: { type: "object", properties: { city: { type: "string" } }, required: ["city"] },
  },
}];

let key = sessionStorage.getItem(KEY) ?? "";
let conversation = [];
let running = null; // the AbortController of the answer that comes
let needsKey = false;

class Refused extends Error {
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

function element(name, options = {}, ...children) {
  const made = document.createElement(name);
  const { text, ...rest } = options;
  if (text !== undefined) made.textContent = text;
  for (const [attribute, value] of Object.entries(rest)) made.setAttribute(attribute, value);
  made.append(...children);
  return made;
}

async function call(path, options = {}) {
  const headers = { ...options.headers };
  if (key) headers.authorization = `Bearer ${key}`;
  const response = await fetch(path, { ...options, headers });
  if (response.ok) return response;
  let message = `${response.status} ${response.statusText}`;
  try {
    message = (await response.json()).error.message;
  } catch {
    // not one of ours: the status has to do
  }
  throw new Refused(response.status, message);
}

function problem(text) {
  $("problem").hidden = !text;
  if ($("problem").textContent !== (text ?? "")) $("problem").textContent = text ?? "";
}

// ---- the fleet

function meter(label, value, most, text) {
  const bar = element("meter", { min: 0, max: Math.max(most, 1), "aria-label": label });
  bar.value = value;
  return [element("dt", { text: label }), element("dd", {}, bar, element("span", { text }))];
}

function line(label, text) {
  return [element("dt", { text: label }), element("dd", { text })];
}

function card(group) {
  const load = group.load;
  const watched = group.watched ? group.state : `${group.state}, not watched`;
  const ranks = group.ranks.map((rank) => `${rank.rank}: ${rank.host} (pid ${rank.pid})`).join("; ");
  const percent = (part, whole) => `${Math.round((100 * part) / Math.max(whole, 1))} %`;
  return element("article", { class: "group", "data-group": group.group },
    element("div", { class: "row" },
      element("h3", { text: group.group }),
      element("span", { class: `state ${group.state}`, text: watched })),
    element("dl", {},
      ...line("model", group.model),
      ...line("device", group.device === "fake" ? "fake: it has no model and only pretends" : group.device),
      ...line("ranks", ranks),
      ...line("window", `${group.max_model_len} tokens`),
      ...meter("running", load.running, group.max_sequences, `${load.running} of ${group.max_sequences} sequences, ${load.waiting} waiting`),
      ...meter("KV cache", load.blocks_used, load.blocks_total, `${load.blocks_used} of ${load.blocks_total} blocks in use (${percent(load.blocks_used, load.blocks_total)})`),
      ...meter("prefix cache", load.blocks_cached, load.blocks_total, `${load.blocks_cached} blocks can be found again`),
      ...line("queued prefill", `${load.queued_prefill_tokens} tokens`),
      ...line("steps", String(load.steps))));
}

function showGroups(groups) {
  const ready = groups.filter((group) => group.state === "ready" && group.watched).length;
  $("summary").textContent = `${ready} of ${groups.length} groups take requests`;
  $("groups").replaceChildren(...(groups.length ? groups.map(card) : [element("p", { class: "quiet", text: "No group is announced." })]));
}

function showModels(models) {
  const chosen = $("model").value;
  const names = models.map((model) => model.id);
  if (names.join("\n") === [...$("model").options].map((option) => option.value).join("\n")) return;
  $("model").replaceChildren(...names.map((name) => element("option", { value: name, text: name })));
  if (names.includes(chosen)) $("model").value = chosen;
}

async function poll() {
  try {
    const [groups, models] = await Promise.all(["groups", "v1/models"].map(async (path) => (await call(path)).json()));
    showGroups(groups.groups);
    showModels(models.data);
    problem(null);
    if (needsKey) $("forget").hidden = false;
    needsKey = false;
    $("key-form").hidden = !key;
  } catch (error) {
    if (error.status === 401) {
      askForKey(key ? error.message : null);
    } else {
      problem(error.status ? error.message : "The router can't be reached.");
      $("summary").textContent = "no connection";
    }
  }
}

async function keepPolling() {
  for (;;) {
    // without a key there is nothing to ask for; a hidden page asks for nothing
    if (!(needsKey && !key) && !document.hidden) await poll();
    await new Promise((done) => setTimeout(done, POLL_MILLISECONDS));
  }
}

function askForKey(message) {
  const first = !needsKey;
  needsKey = true;
  if (message) {
    key = "";
    sessionStorage.removeItem(KEY);
  }
  $("key-form").hidden = false;
  $("forget").hidden = true;
  $("summary").textContent = "an API key is needed";
  problem(message);
  if (first || message) $("key").focus();
}

// ---- the chat

function addMessage(who, text) {
  const body = element("pre", { text });
  const item = element("li", { class: `message ${who}` }, element("span", { class: "who", text: who }), body);
  $("messages").append(item);
  item.scrollIntoView({ block: "end" });
  return { item, body };
}

function showCall(item, tool) {
  const name = element("strong", { text: tool.function.name });
  const code = element("pre", { text: tool.function.arguments });
  const box = element("div", { class: "call", "data-tool": tool.function.name }, element("span", { class: "quiet", text: "calls " }), name, code);
  item.append(box);
  return { box, code };
}

function offerResults(item, calls, views) {
  let open = calls.length;
  calls.forEach((tool, index) => {
    const id = `result-${tool.id}`;
    const input = element("input", { id, required: "" });
    const form = element("form", {}, element("label", { for: id, text: "Result" }), input, element("button", { text: "Give result" }));
    form.addEventListener("submit", (event) => {
      event.preventDefault();
      conversation.push({ role: "tool", tool_call_id: tool.id, content: input.value });
      form.replaceWith(element("pre", { text: `result: ${input.value}` }));
      open -= 1;
      if (open === 0) answer();
    });
    views[index].box.append(form);
    if (index === 0) input.focus();
  });
}

function tools() {
  if (!$("with-tools").checked) return undefined;
  const list = JSON.parse($("tools").value);
  if (!Array.isArray(list)) throw new Error("a list is expected");
  return list;
}

async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    rest += value;
    const parts = rest.split("\n\n");
    rest = parts.pop();
    for (const part of parts) {
      const data = part.split("\n").filter((one) => one.startsWith("data: ")).map((one) => one.slice(6)).join("\n");
      if (data && data !== "[DONE]") yield JSON.parse(data);
    }
  }
}

function take(event, view, message) {
  if (event.error) throw new Error(event.error.message);
  if (event.usage) {
    const cached = event.usage.prompt_tokens_details?.cached_tokens ?? 0;
    $("usage").textContent = `${event.usage.prompt_tokens} prompt tokens, ${cached} of them cached; ${event.usage.completion_tokens} answered`;
  }
  const delta = event.choices?.[0]?.delta;
  if (delta?.content) {
    message.content += delta.content;
    view.body.textContent = message.content;
  }
  for (const piece of delta?.tool_calls ?? []) {
    let tool = message.tool_calls[piece.index];
    if (!tool) {
      tool = message.tool_calls[piece.index] = { id: piece.id, type: "function", function: { name: piece.function.name, arguments: "" } };
      view.calls[piece.index] = showCall(view.item, tool);
    }
    tool.function.arguments += piece.function.arguments ?? "";
    view.calls[piece.index].code.textContent = tool.function.arguments;
  }
  view.item.scrollIntoView({ block: "end" });
}

function busy(now) {
  running = now;
  $("send").disabled = now !== null;
  $("stop").disabled = now === null;
  $("messages").setAttribute("aria-busy", String(now !== null));
}

async function answer() {
  let offered;
  try {
    offered = tools();
  } catch (error) {
    problem(`The tools are not valid: ${error.message}`);
    return;
  }
  const stopper = new AbortController();
  busy(stopper);
  const view = { ...addMessage("assistant", ""), calls: [] };
  const message = { role: "assistant", content: "", tool_calls: [] };
  try {
    const body = {
      model: $("model").value, messages: conversation, stream: true, stream_options: { include_usage: true },
      max_tokens: Number($("max-tokens").value), temperature: Number($("temperature").value), tools: offered,
    };
    const response = await call("v1/chat/completions", {
      method: "POST", headers: { "content-type": "application/json" }, body: JSON.stringify(body), signal: stopper.signal,
    });
    for await (const event of events(response)) take(event, view, message);
  } catch (error) {
    const stopped = error.name === "AbortError";
    view.item.append(element("p", { class: stopped ? "quiet" : "error", text: stopped ? "stopped" : error.message }));
    if (error.status === 401) askForKey(error.message);
  }
  busy(null);
  const calls = message.tool_calls;
  if (!message.content && !calls.length) {
    // nothing came: the question may be asked again as it was
    return;
  }
  conversation.push({ role: "assistant", content: message.content || null, ...(calls.length ? { tool_calls: calls } : {}) });
  if (calls.length) offerResults(view.item, calls, view.calls);
}

function ask() {
  const text = $("prompt").value.trim();
  if (!text || running) return;
  $("prompt").value = "";
  // a question that got no answer is replaced by the next one
  if (conversation.at(-1)?.role === "user") conversation.pop();
  conversation.push({ role: "user", content: text });
  addMessage("user", text);
  answer();
}

$("ask").addEventListener("submit", (event) => { event.preventDefault(); ask(); });
$("prompt").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) { event.preventDefault(); ask(); }
});
document.addEventListener("keydown", (event) => { if (event.key === "Escape") running?.abort(); });
$("stop").addEventListener("click", () => running?.abort());
$("clear").addEventListener("click", () => {
  running?.abort();
  conversation = [];
  $("messages").replaceChildren();
  $("usage").textContent = "";
  $("prompt").focus();
});
$("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  key = $("key").value.trim();
  $("key").value = "";
  sessionStorage.setItem(KEY, key);
  poll();
});
$("forget").addEventListener("click", () => {
  key = "";
  sessionStorage.removeItem(KEY);
  needsKey = false;
  poll();
});
$("tools").value = JSON.stringify(EXAMPLE_TOOLS, null, 1);
keepPolling();
