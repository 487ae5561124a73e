//! `POST /v1/chat/completions`: writes the response as one object or as chunks.

use super::{
    completion::{Choice, Completion},
    response::{
        ChatChoice, ChatChunkChoice, ChatDelta, ChatLogprobs, ChatMessage, ChatObject, PromptLogprobList, TokenNames,
        ToolCallObject,
    },
    sse::{EventWriter, write_done, write_event},
};
use crate::relay::emit::{CallDelta, Finish};

const CHUNK: &str = "chat.completion.chunk";

/// Writes a complete response that is not streamed.
pub fn object(completion: &Completion) -> serde_json::Result<Vec<u8>> {
    let names = completion.names();
    let params = &completion.params;
    let choices: Vec<ChatChoice<'_>> = completion
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
        id: &completion.id,
        object: "chat.completion",
        created: completion.created,
        model: &completion.model,
        choices,
        usage: Some(completion.usage()),
        prompt_logprobs: params.prompt_logprobs.map(|top| PromptLogprobList {
            positions: &completion.choices[0].prompt_logprobs,
            top,
            names,
        }),
        prompt_token_ids: params.return_token_ids.then(|| &completion.tasks[0].ids),
    })
}

fn logprobs<'a>(choice: &Choice, top: Option<u32>, names: TokenNames<'a>) -> Option<ChatLogprobs<'a>> {
    top.map(|top| ChatLogprobs::new(&choice.delta.logprobs, top, names))
}

/// Writes the chunks of a streamed response.
#[derive(Default)]
pub struct ChatWriter {
    finished: usize,
}

impl EventWriter for ChatWriter {
    fn begin(&mut self, completion: &mut Completion, out: &mut Vec<u8>) {
        for index in 0..completion.choices.len() {
            let choice = ChatChunkChoice {
                index: index as u32,
                delta: ChatDelta { role: Some("assistant"), content: Some(""), tool_calls: None },
                logprobs: None,
                finish_reason: None,
                stop_reason: None,
                token_ids: None,
            };
            let ids = completion.params.return_token_ids.then(|| &completion.tasks[0].ids);
            let mut chunk = chunk(completion, [choice]);
            chunk.prompt_token_ids = ids;
            write_event(&chunk, out);
        }
    }

    fn progress(&mut self, completion: &mut Completion, number: usize, out: &mut Vec<u8>) {
        let choice = &completion.choices[number];
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
            logprobs: logprobs(choice, completion.params.top_logprobs, completion.names())
                .filter(|logprobs| !logprobs.content.is_empty()),
            finish_reason: choice.finish.map(Finish::as_str),
            stop_reason: choice.stop_reason(),
            token_ids: completion.params.return_token_ids.then_some(delta.token_ids.as_slice()),
        };
        let mut chunk = chunk(completion, [chunk_choice]);
        // Mistral's client does not ask for usage and reads it from the last chunk of the response
        let last_for_mistral =
            completion.mistral_client() && completion.is_over() && self.finished == completion.choices.len();
        if completion.params.continuous_usage || last_for_mistral {
            chunk.usage = Some(completion.usage());
        }
        write_event(&chunk, out);
        completion.choices[number].delta.clear();
    }

    fn end(&mut self, completion: &mut Completion, out: &mut Vec<u8>) {
        if completion.params.include_usage {
            let mut chunk = chunk(completion, [] as [ChatChunkChoice<'_>; 0]);
            chunk.usage = Some(completion.usage());
            write_event(&chunk, out);
        }
        write_done(out);
    }
}

fn chunk<C>(completion: &Completion, choices: C) -> ChatObject<'_, C> {
    ChatObject {
        id: &completion.id,
        object: CHUNK,
        created: completion.created,
        model: &completion.model,
        choices,
        usage: None,
        prompt_logprobs: None,
        prompt_token_ids: None,
    }
}
