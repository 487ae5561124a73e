// Anthropic's JavaScript client against a running cluster: see openai.mjs.
import assert from "node:assert/strict";
import { createRequire } from "node:module";
import { pathToFileURL } from "node:url";

const packages = createRequire(process.env.BORA_PACKAGES + "/");
const { default: Anthropic } = await import(pathToFileURL(packages.resolve("@anthropic-ai/sdk")));

const cases = JSON.parse(process.env.BORA_CASES);
const connect = (apiKey) => new Anthropic({ baseURL: process.env.BORA_URL.replace(/\/v1$/, ""), apiKey, maxRetries: 0, timeout: 60_000 });
const client = connect(process.env.BORA_KEY);
const { model } = cases;
const tools = cases.tools.map(({ function: f }) => ({ name: f.name, description: f.description, input_schema: f.parameters }));
const ask = (content) => ({ model, max_tokens: 500, messages: [{ role: "user", content }] });

// plain and streamed
const plain = await client.messages.create(ask(cases.plain));
assert.equal(plain.content[0].text, cases.plain_answer);
const stream = client.messages.stream(ask(cases.plain));
assert.equal(await stream.finalText(), cases.plain_answer);

// parallel calls, put together by the client's own helper
const calling = await client.messages.stream({ ...ask(cases.parallel), tools }).finalMessage();
assert.equal(calling.stop_reason, "tool_use");
assert.equal(calling.content[0].text, cases.parallel_text);
assert.deepEqual(
  calling.content.slice(1).map((block) => [block.name, block.input]),
  cases.parallel_calls.map(([name, text]) => [name, JSON.parse(text)]),
);

// a loop of tools
const functions = { add: ({ a, b }) => String(a + b), multiply: ({ a, b }) => String(a * b) };
const messages = ask(cases.loop).messages;
let answer;
for (let turn = 0; turn < 5; turn += 1) {
  answer = await client.messages.create({ model, max_tokens: 500, messages, tools });
  messages.push({ role: "assistant", content: answer.content });
  const used = answer.content.filter((block) => block.type === "tool_use");
  if (used.length === 0) break;
  messages.push({ role: "user", content: used.map((block) => ({ type: "tool_result", tool_use_id: block.id, content: functions[block.name](block.input) })) });
}
assert.equal(answer.content[0].text, cases.loop_answer);

// errors
for (const [who, more, kind] of [
  [connect("wrong"), {}, Anthropic.AuthenticationError],
  [client, { model: "gpt-5" }, Anthropic.NotFoundError],
  [client, { messages: [] }, Anthropic.BadRequestError],
]) {
  await assert.rejects(who.messages.create({ ...ask(cases.plain), ...more }), kind);
}

console.log("passed");
