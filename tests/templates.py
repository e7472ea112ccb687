"""Chat templates with the traits of well-known models, small, and their special tokens.

Each stands for the models named in `STANDS_FOR`; axolotl's own templates are tested as they are. The text of a
model's template is its authors'; these were written for the tests, with the traits that matter here.
"""

from tiny import CHATML, make_tokenizer

IM = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]

# thinking on: nothing in the generation prompt, an empty block in answers without thoughts, old thoughts dropped
QWEN3 = """{%- set ns = namespace(last=0) %}{%- for m in messages %}{%- if m.role == 'user' %}{%- set ns.last = loop.index0 %}{%- endif %}{%- endfor %}
{%- for m in messages %}{%- if m.role == 'assistant' %}
{%- set said = m.content %}{%- set mind = m.reasoning_content if m.reasoning_content is defined else '' %}
{%- if '</think>' in said %}{%- set mind = said.split('</think>')[0].split('<think>')[-1].strip('\\n') %}{%- set said = said.split('</think>')[-1].lstrip('\\n') %}{%- endif %}
{{- '<|im_start|>assistant\\n' }}{%- if loop.index0 > ns.last %}{{- '<think>\\n' + mind.strip('\\n') + '\\n</think>\\n\\n' + said.lstrip('\\n') }}{%- else %}{{- said }}{%- endif %}
{%- for c in m.tool_calls or [] %}{{- '<tool_call>\\n' + c.function.name + ' ' + (c.function.arguments | tojson) + '\\n</tool_call>' }}{%- endfor %}{{- '<|im_end|>\\n' }}
{%- else %}{{- '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{%- endif %}{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- if enable_thinking is defined and not enable_thinking %}{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}{%- endif %}"""
# the generation prompt opens a block; answers are written without it and lose their thoughts
R1 = """{{- bos_token }}{%- for m in messages %}{%- if m.role == 'assistant' %}{%- set said = m.content.split('</think>')[-1] if '</think>' in m.content else m.content %}
{{- '<|Assistant|>' + said + eos_token }}{%- else %}{{- ('<|User|>' if m.role == 'user' else '') + m.content }}{%- endif %}{%- endfor %}
{%- if add_generation_prompt %}{{- '<|Assistant|><think>\\n' }}{%- endif %}"""
# the generation prompt opens a block and answers keep it
THINKING = """{%- for m in messages %}{%- if m.role == 'assistant' %}{%- set mind = '' %}{%- set said = m.content %}
{%- if '</think>' in said %}{%- set mind = said.split('</think>')[0].split('<think>')[-1].strip('\\n') %}{%- set said = said.split('</think>')[-1].lstrip('\\n') %}{%- endif %}
{{- '<|im_start|>assistant\\n' }}{%- if loop.last %}{{- '<think>\\n' + mind + '\\n</think>\\n\\n' }}{%- endif %}{{- said + '<|im_end|>\\n' }}
{%- else %}{{- '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{%- endif %}{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n<think>\\n' }}{%- endif %}"""
# a system turn with the date and a switch; the answer begins behind an empty block
SMOLLM3 = """{{- '<|im_start|>system\\n## Metadata\\nToday: ' + strftime_now('%d %B %Y') + '\\nReasoning: /no_think<|im_end|>\\n' }}
{%- for m in messages %}{%- if m.role == 'assistant' %}{{- '<|im_start|>assistant\\n' + ('<think>\\n\\n</think>\\n' if loop.last else '') + m.content.lstrip('\\n') + '<|im_end|>\\n' }}
{%- elif m.role != 'system' %}{{- '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{%- endif %}{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n<think>\\n\\n</think>\\n' }}{%- endif %}"""
# trims what it is given; BOS; the date in the system turn
LLAMA31 = """{{- bos_token }}{%- set system = '' %}{%- if messages[0].role == 'system' %}{%- set system = messages[0].content | trim %}{%- set messages = messages[1:] %}{%- endif %}
{{- '<|start_header_id|>system<|end_header_id|>\\n\\nToday Date: ' + strftime_now('%d %b %Y') + '\\n\\n' + system + '<|eot_id|>' }}
{%- for m in messages %}{%- if m.tool_calls %}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n{"name": "' + m.tool_calls[0].function.name + '", "parameters": ' + (m.tool_calls[0].function.arguments | tojson) + '}<|eom_id|>' }}
{%- elif m.role == 'tool' %}{{- '<|start_header_id|>ipython<|end_header_id|>\\n\\n' + (m.content | tojson) + '<|eot_id|>' }}
{%- else %}{{- '<|start_header_id|>' + m.role + '<|end_header_id|>\\n\\n' + (m.content | trim) + '<|eot_id|>' }}{%- endif %}{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{%- endif %}"""
# no system role, turns must alternate, trims, the assistant is called model
GEMMA = """{{- bos_token }}{%- if messages[0].role == 'system' %}{{- raise_exception('System role not supported') }}{%- endif %}
{%- for m in messages %}{%- if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{- raise_exception('Conversation roles must alternate') }}{%- endif %}
{{- '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\\n' + (m.content | trim) + '<end_of_turn>\\n' }}{%- endfor %}
{%- if add_generation_prompt %}{{- '<start_of_turn>model\\n' }}{%- endif %}"""
# the system message goes into the user's turn; no generation prompt; a space before the answer
MISTRAL = """{{- bos_token }}{%- set system = '' %}{%- if messages[0].role == 'system' %}{%- set system = messages[0].content %}{%- set messages = messages[1:] %}{%- endif %}
{%- for m in messages %}{%- if m.role == 'user' %}{{- '[INST] ' + (system + '\\n\\n' if loop.last and system else '') + m.content + '[/INST]' }}
{%- else %}{{- ' ' + m.content + eos_token }}{%- endif %}{%- endfor %}"""
# an end of turn, and after a whole conversation an end of text
PHI35 = """{%- for m in messages %}{{- '<|' + m.role + '|>\\n' + m.content + '<|end|>\\n' }}{%- endfor %}
{%- if add_generation_prompt %}{{- '<|assistant|>\\n' }}{%- else %}{{- eos_token }}{%- endif %}"""
# channels: an answer begins in the middle of its header; the last turn ends otherwise than the ones before
GPT_OSS = """{%- for m in messages %}{%- if m.role == 'assistant' %}
{%- if m.thinking is defined and loop.last %}{{- '<|start|>assistant<|channel|>analysis<|message|>' + m.thinking + '<|end|>' }}{%- endif %}
{{- '<|start|>assistant<|channel|>final<|message|>' + m.content + ('<|return|>' if loop.last else '<|end|>') }}
{%- else %}{{- '<|start|>' + m.role + '<|message|>' + m.content + '<|end|>' }}{%- endif %}{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start|>assistant' }}{%- endif %}"""
# two tokens end a turn, of which only the last one stops the model
COMMAND_R7B = """{{- bos_token }}{%- for m in messages %}{%- if m.role == 'assistant' %}
{{- '<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|><|START_RESPONSE|>' + m.content + '<|END_RESPONSE|><|END_OF_TURN_TOKEN|>' }}
{%- else %}{{- '<|START_OF_TURN_TOKEN|><|' + m.role | upper + '_TOKEN|>' + m.content + '<|END_OF_TURN_TOKEN|>' }}{%- endif %}{%- endfor %}
{%- if add_generation_prompt %}{{- '<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>' }}{%- endif %}"""
OLMO2 = """{{- bos_token }}{%- for m in messages %}{%- if m.role == 'assistant' %}{{- '<|assistant|>\\n' + m.content + eos_token + ('' if loop.last else '\\n') }}
{%- else %}{{- '<|' + m.role + '|>\\n' + m.content + '\\n' }}{%- endif %}{%- endfor %}{%- if add_generation_prompt %}{{- '<|assistant|>\\n' }}{%- endif %}"""
GRANITE = """{%- if messages[0].role != 'system' %}{{- '<|start_of_role|>system<|end_of_role|>Today: ' + strftime_now('%B %d, %Y') + '.<|end_of_text|>\\n' }}{%- endif %}
{%- for m in messages %}{{- '<|start_of_role|>' + m.role + '<|end_of_role|>' + m.content + '<|end_of_text|>\\n' }}{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start_of_role|>assistant<|end_of_role|>' }}{%- endif %}"""
# nothing ends an answer: the model stops by beginning the next turn
GLM4 = """{{- '[gMASK]<sop>' }}{%- for m in messages %}{{- '<|' + m.role + '|>\\n' + m.content }}{%- endfor %}{%- if add_generation_prompt %}{{- '<|assistant|>' }}{%- endif %}"""
# a default system message
SMOLLM2 = (
    """{%- if messages[0].role != 'system' %}{{- '<|im_start|>system\\nYou are SmolLM<|im_end|>\\n' }}{%- endif %}"""
    + CHATML
)

_LLAMA = [
    "<|begin_of_text|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
    "<|eom_id|>",
]
_COHERE = ["<BOS_TOKEN>", "<|START_OF_TURN_TOKEN|>", "<|END_OF_TURN_TOKEN|>", "<|CHATBOT_TOKEN|>"]
_COHERE += ["<|USER_TOKEN|>", "<|SYSTEM_TOKEN|>", "<|START_RESPONSE|>", "<|END_RESPONSE|>"]

# name -> (template, special tokens, bos, eos, tokens that generation_config.json names as ends, end of a turn)
TEMPLATES = {
    "chatml": (CHATML, IM, None, "<|im_end|>", ["<|im_end|>"], "<|im_end|>"),
    "chatml, other eos": (CHATML, IM, None, "<|endoftext|>", [], "<|im_end|>"),
    "chatml, no tokens": (CHATML.replace("<|im_", "<*"), ["</s>"], None, "</s>", ["</s>"], "<*end|>"),
    "qwen3": (QWEN3, IM, None, "<|im_end|>", ["<|im_end|>", "<|endoftext|>"], "<|im_end|>"),
    "thinking": (THINKING, IM, None, "<|im_end|>", ["<|im_end|>"], "<|im_end|>"),
    "r1": (R1, ["<s>", "</s>", "<|User|>", "<|Assistant|>"], "<s>", "</s>", ["</s>"], "</s>"),
    "smollm2": (SMOLLM2, IM, None, "<|im_end|>", ["<|im_end|>"], "<|im_end|>"),
    "smollm3": (SMOLLM3, IM, None, "<|im_end|>", ["<|im_end|>"], "<|im_end|>"),
    "llama3.1": (LLAMA31, _LLAMA, _LLAMA[0], "<|eot_id|>", ["<|eot_id|>", "<|eom_id|>"], "<|eot_id|>"),
    "gemma": (GEMMA, ["<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>"], "<bos>", "<eos>", ["<eos>", "<end_of_turn>"], "<end_of_turn>"),
    "mistral": (MISTRAL, ["<s>", "</s>", "[INST]", "[/INST]"], "<s>", "</s>", ["</s>"], "</s>"),
    "phi3.5": (PHI35, ["<|endoftext|>", "<|end|>", "<|user|>", "<|assistant|>"], None, "<|endoftext|>", ["<|endoftext|>", "<|assistant|>", "<|end|>"], "<|end|>"),
    "phi3.5, nothing named": (PHI35, ["<|endoftext|>", "<|end|>", "<|user|>", "<|assistant|>"], None, "<|endoftext|>", [], "<|end|>"),
    "gpt-oss": (GPT_OSS, ["<|start|>", "<|end|>", "<|message|>", "<|channel|>", "<|return|>"], None, "<|return|>", ["<|return|>"], "<|return|>"),
    "command-r7b": (COMMAND_R7B, _COHERE, _COHERE[0], "<|END_OF_TURN_TOKEN|>", ["<|END_OF_TURN_TOKEN|>"], "<|END_RESPONSE|><|END_OF_TURN_TOKEN|>"),
    "olmo2": (OLMO2, ["<|endoftext|>", "<|user|>", "<|assistant|>"], "<|endoftext|>", "<|endoftext|>", ["<|endoftext|>"], "<|endoftext|>"),
    "granite": (GRANITE, ["<|end_of_text|>", "<|start_of_role|>", "<|end_of_role|>"], None, "<|end_of_text|>", ["<|end_of_text|>"], "<|end_of_text|>"),
    "glm4": (GLM4, ["<|endoftext|>", "[gMASK]", "<sop>", "<|user|>", "<|assistant|>", "<|system|>"], None, "<|endoftext|>", ["<|endoftext|>", "<|user|>"], "<|user|>"),
}  # fmt: skip
# which models have these traits
STANDS_FOR = {
    "chatml": "ChatML, Qwen2.5, Qwen3-2507 instruct",
    "chatml, other eos": "ChatML fine-tunes whose EOS is <|endoftext|>, Phi-4",
    "chatml, no tokens": "a base model without a template, with axolotl's chatml",
    "qwen3": "Qwen3 with thinking on or off, rows with and without <think>",
    "thinking": "Qwen3-2507 thinking",
    "r1": "DeepSeek-R1-Distill",
    "smollm2": "SmolLM2",
    "smollm3": "SmolLM3 without thinking",
    "llama3.1": "Llama 3.1, 3.2, 3.3",
    "gemma": "Gemma 2 and 3",
    "mistral": "Mistral v3 and tekken forms",
    "phi3.5": "Phi-3.5",
    "phi3.5, nothing named": "Phi-3.5 without its generation_config.json",
    "gpt-oss": "gpt-oss (channels)",
    "command-r7b": "Command-R and R7B",
    "olmo2": "OLMo 2",
    "granite": "Granite 3",
    "glm4": "GLM-4",
}
# axolotl's own -> (special tokens, eos, end of a turn)
AXOLOTL = {
    "chatml": (IM, "<|im_end|>", "<|im_end|>"),
    "qwen_25": (IM, "<|im_end|>", "<|im_end|>"),
    "qwen3": (IM, "<|im_end|>", "<|im_end|>"),
    "llama3": (_LLAMA, "<|eot_id|>", "<|eot_id|>"),
    "gemma": (["<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>"], "<eos>", "<end_of_turn>"),
    "gemma3": (["<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>"], "<eos>", "<end_of_turn>"),
    "mistral_v1": (["<s>", "</s>"], "</s>", "</s>"),
    "mistral_v2v3": (["<s>", "</s>", "[INST]", "[/INST]"], "</s>", "</s>"),
    "mistral_v3_tekken": (["<s>", "</s>", "[INST]", "[/INST]"], "</s>", "</s>"),
    "mistral_v7_tekken": (["<s>", "</s>", "[INST]", "[/INST]", "[SYSTEM_PROMPT]"], "</s>", "</s>"),
    "phi_3": (["<|end|>", "<|user|>", "<|assistant|>"], "<|end|>", "<|end|>"),
    "phi_35": (["<|endoftext|>", "<|end|>", "<|user|>"], "<|endoftext|>", "<|end|>"),
    "phi_4": ([*IM, "<|im_sep|>"], "<|endoftext|>", "<|im_end|>"),
    "cohere": (_COHERE, "<|END_OF_TURN_TOKEN|>", "<|END_OF_TURN_TOKEN|>"),
}


def tokenizer_of(special, bos, eos, template=None):
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": special})
    tokenizer.eos_token = eos
    tokenizer.bos_token = bos
    tokenizer.chat_template = template
    return tokenizer


def known(name):
    """(tokenizer, template's text, ids of the ends that the model names, end of a turn)."""
    template, special, bos, eos, ends, end = TEMPLATES[name]
    tokenizer = tokenizer_of(special, bos, eos, template)
    return tokenizer, template, [tokenizer.convert_tokens_to_ids(e) for e in ends], end
