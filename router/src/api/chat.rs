//! `POST /v1/chat/completions`: the answer as one object or as chunks.

use super::{
    answer::{Answer, Choice},
    response::{
        ChatChoice, ChatChunkChoice, ChatDelta, ChatLogprobs, ChatMessage, ChatObject, PromptLogprobList, TokenNames,
        ToolCallObject,
    },
    sse::{EventWriter, write_done, write_event},
};
use crate::relay::emit::{CallDelta, Finish};

const CHUNK: &str = "chat.completion.chunk";

/// The plain answer, complete.
pub fn object(answer: &Answer) -> serde_json::Result<Vec<u8>> {
    let names = answer.names();
    let params = &answer.params;
    let choices: Vec<ChatChoice<'_>> = answer
        .choices
        .iter()
        .enumerate()
        .map(|(index, choice)| {
            let delta = &choice.delta;
            let calls: Vec<_> = delta.calls.iter().map(|call| ToolCallObject::new(call, false)).collect();
            let only_calls = delta.text.is_empty() && !calls.is_empty();
            ChatChoice {
                index: index as u32,
                message: ChatMessage {
                    role: "assistant",
                    content: (!only_calls).then_some(delta.text.as_str()),
                    tool_calls: (!calls.is_empty()).then_some(calls),
                },
                logprobs: logprobs(choice, params.top_logprobs, names),
                finish_reason: choice.finish.map(Finish::as_str),
                stop_reason: choice.stop_reason(),
                token_ids: params.return_token_ids.then_some(delta.token_ids.as_slice()),
            }
        })
        .collect();
    serde_json::to_vec(&ChatObject {
        id: &answer.id,
        object: "chat.completion",
        created: answer.created,
        model: &answer.model,
        choices,
        usage: Some(answer.usage()),
        prompt_logprobs: params.prompt_logprobs.map(|top| PromptLogprobList {
            positions: &answer.choices[0].prompt_logprobs,
            top,
            names,
        }),
        prompt_token_ids: params.return_token_ids.then(|| &answer.tasks[0].ids),
    })
}

fn logprobs<'a>(choice: &Choice, top: Option<u32>, names: TokenNames<'a>) -> Option<ChatLogprobs<'a>> {
    top.map(|top| ChatLogprobs::new(&choice.delta.logprobs, top, names))
}

/// Writes the chunks of a streamed answer.
#[derive(Default)]
pub struct ChatWriter {
    finished: usize,
}

impl EventWriter for ChatWriter {
    fn begin(&mut self, answer: &mut Answer, out: &mut Vec<u8>) {
        for index in 0..answer.choices.len() {
            let choice = ChatChunkChoice {
                index: index as u32,
                delta: ChatDelta { role: Some("assistant"), content: Some(""), tool_calls: None },
                logprobs: None,
                finish_reason: None,
                stop_reason: None,
                token_ids: None,
            };
            let ids = answer.params.return_token_ids.then(|| &answer.tasks[0].ids);
            let mut chunk = chunk(answer, [choice]);
            chunk.prompt_token_ids = ids;
            write_event(&chunk, out);
        }
    }

    fn progress(&mut self, answer: &mut Answer, number: usize, out: &mut Vec<u8>) {
        let choice = &answer.choices[number];
        let delta = &choice.delta;
        if delta.is_empty() && choice.finish.is_none() {
            return;
        }
        self.finished += usize::from(choice.finish.is_some());
        let says_something = |call: &&CallDelta| call.start.is_some() || !call.arguments.is_empty();
        let calls = delta.calls.iter().filter(says_something);
        let calls: Vec<_> = calls.map(|call| ToolCallObject::new(call, true)).collect();
        let chunk_choice = ChatChunkChoice {
            index: number as u32,
            delta: ChatDelta {
                role: None,
                content: (!delta.text.is_empty()).then_some(delta.text.as_str()),
                tool_calls: (!calls.is_empty()).then_some(calls),
            },
            logprobs: logprobs(choice, answer.params.top_logprobs, answer.names())
                .filter(|logprobs| !logprobs.content.is_empty()),
            finish_reason: choice.finish.map(Finish::as_str),
            stop_reason: choice.stop_reason(),
            token_ids: answer.params.return_token_ids.then_some(delta.token_ids.as_slice()),
        };
        let mut chunk = chunk(answer, [chunk_choice]);
        // Mistral's client asks for no usage and reads it from the chunk that ends the answer
        let last_for_mistral = answer.mistral_client() && answer.is_over() && self.finished == answer.choices.len();
        if answer.params.continuous_usage || last_for_mistral {
            chunk.usage = Some(answer.usage());
        }
        write_event(&chunk, out);
        answer.choices[number].delta.clear();
    }

    fn end(&mut self, answer: &mut Answer, out: &mut Vec<u8>) {
        if answer.params.include_usage {
            let mut chunk = chunk(answer, [] as [ChatChunkChoice<'_>; 0]);
            chunk.usage = Some(answer.usage());
            write_event(&chunk, out);
        }
        write_done(out);
    }
}

fn chunk<C>(answer: &Answer, choices: C) -> ChatObject<'_, C> {
    ChatObject {
        id: &answer.id,
        object: CHUNK,
        created: answer.created,
        model: &answer.model,
        choices,
        usage: None,
        prompt_logprobs: None,
        prompt_token_ids: None,
    }
}
