"""One conversation of the OpenHands agent, run in its own environment by test_openhands.py: BORA_URL, BORA_KEY, BORA_MODEL,
BORA_TASK, and the folder to work in as argument. Prints a JSON object of what happened."""

import json
import os
import sys

from openhands.sdk import LLM, Agent, Conversation, Tool
from openhands.tools.terminal import TerminalTool

events = []
llm = LLM(model=f"openai/{os.environ['BORA_MODEL']}", base_url=os.environ["BORA_URL"], api_key=os.environ["BORA_KEY"], temperature=0.0, num_retries=0,
          stream=False, usage_id="bora", native_tool_calling=True,
          reasoning_effort=None)  # Devstral does not reason: Bora refuses the field rather than ignore what was asked for
agent = Agent(llm=llm, tools=[Tool(name=TerminalTool.name, params={"terminal_type": "subprocess"})])
conversation = Conversation(agent=agent, workspace=sys.argv[1], callbacks=[events.append], max_iteration_per_run=6, visualizer=None)
conversation.send_message(os.environ["BORA_TASK"])
conversation.run()
print(json.dumps({
    "status": conversation.state.execution_status.value,
    "actions": [event.tool_name for event in events if type(event).__name__ == "ActionEvent"],
    "errors": [str(event) for event in events if "Error" in type(event).__name__],
    "prompt_tokens": llm.metrics.accumulated_token_usage.prompt_tokens,
}))
