// The official JavaScript client against a running cluster: BORA_URL, BORA_KEY, BORA_CASES (the conversations of
// conversations.py). Every check throws; the last line on standard output is "passed".
import assert from "node:assert/strict";
import { createRequire } from "node:module";
import { pathToFileURL } from "node:url";

// packages are not installed beside this file
const packages = createRequire(process.env.BORA_PACKAGES + "/");
const { default: OpenAI } = await import(pathToFileURL(packages.resolve("openai")));

const cases = JSON.parse(process.env.BORA_CASES);
const connect = (apiKey, maxRetries = 0) => new OpenAI({ baseURL: process.env.BORA_URL, apiKey, maxRetries, timeout: 60_000 });
const client = connect(process.env.BORA_KEY);
const { model, slow, tools } = cases;
const user = (content) => [{ role: "user", content }];

// models
const names = [];
for await (const one of client.models.list()) names.push(one.id);
assert(names.includes(model));
assert.equal((await client.models.retrieve(model)).id, model);
assert.equal((await client.models.retrieve(cases.card_name)).id, cases.card_name);

// plain and streamed
const plain = await client.chat.completions.create({ model, messages: user(cases.plain) });
assert.equal(plain.choices[0].message.content, cases.plain_answer);
let text = "";
let usage;
const stream = await client.chat.completions.create({ model, messages: user(cases.plain), stream: true, stream_options: { include_usage: true } });
for await (const chunk of stream) {
  text += chunk.choices[0]?.delta?.content ?? "";
  usage = chunk.usage ?? usage;
}
assert.equal(text, cases.plain_answer);
assert.equal(usage.completion_tokens, plain.usage.completion_tokens);

// parallel calls, put together by the client's own helper
const calling = client.chat.completions.stream({ model, messages: user(cases.parallel), tools });
const message = (await calling.finalChatCompletion()).choices[0].message;
assert.equal(message.content, cases.parallel_text);
assert.deepEqual(message.tool_calls.map((call) => [call.function.name, call.function.arguments]), cases.parallel_calls);

// the client's own loop of tools
const called = [];
const functions = {
  add: ({ a, b }) => String(a + b),
  multiply: ({ a, b }) => String(a * b),
};
const runnable = tools
  .filter((tool) => tool.function.name in functions)
  .map(({ function: f }) => ({
    type: "function",
    function: {
      ...f,
      parse: JSON.parse,
      function: (args) => {
        called.push(f.name);
        return functions[f.name](args);
      },
    },
  }));
for (const streamed of [false, true]) {
  called.length = 0;
  const runner = client.chat.completions.runTools({ model, messages: user(cases.loop), tools: runnable, stream: streamed });
  assert.equal(await runner.finalContent(), cases.loop_answer);
  assert.deepEqual(called, ["add", "multiply"]);
}

// errors
const refusals = [
  [connect("wrong"), {}, OpenAI.AuthenticationError, "invalid_api_key"],
  [client, { model: "gpt-5" }, OpenAI.NotFoundError, "model_not_found"],
  [client, { messages: user("x y ".repeat(200_000)) }, OpenAI.BadRequestError, "context_length_exceeded"],
  [client, { temperature: 9 }, OpenAI.BadRequestError, null],
];
for (const [who, ask, kind, code] of refusals) {
  await assert.rejects(who.chat.completions.create({ model, messages: user(cases.plain), ...ask }), (error) => {
    assert(error instanceof kind, `${error}`);
    assert.equal(error.code, code);
    assert(error.requestID);
    return true;
  });
}

// 429 while the tenant's other request runs; the client's own retries bring it through
const busy = await connect(cases.single_key).chat.completions.create({ model: slow, messages: user("a"), max_tokens: 60, ignore_eos: true, stream: true });
const reader = busy[Symbol.asyncIterator]();
await reader.next();
await assert.rejects(connect(cases.single_key).chat.completions.create({ model, messages: user(cases.plain) }), OpenAI.RateLimitError);
const patient = connect(cases.single_key, 6).chat.completions.create({ model, messages: user(cases.plain) });
while (!(await reader.next()).done);
assert.equal((await patient).choices[0].message.content, cases.plain_answer);

// cancelling
const endless = await client.chat.completions.create({ model: slow, messages: user("b"), max_tokens: 4000, ignore_eos: true, stream: true });
for await (const _ of endless) break;
endless.controller.abort();

console.log("passed");
