"""Phrases with which people and models decline, as patterns for `sentences`: English, lower case, our own.

`PHRASES` are searched for in a sentence, beside the general `forms`: its speaker cannot or will not do
something for the user, the request is ruled out, or it is turned down in other words. Each stands for a way
of saying no, not for a sentence.
"""

SELF = r"\b(?:i|we)\b"
# Between the speaker and the verb nobody else may come in.
NEAR = r"(?:(?!\b(?:you|they|he|she|who|people|if|when|because|that's|what)\b)[^.!?;:\n]){0,45}?"
MODAL = (
    r"(?:can't|cannot|can not|could(?:n't| not)|won't|will not|wouldn't|would not|shan't|shall not"
    r"|should(?:n't| not)"
    r"|must(?:n't| not)|can no longer|(?:can|could|will|would|'ll|'d|shall|should|may) never|may not)"
)
ADVERB = (
    r"(?:(?:just|really|simply|possibly|honestly|personally|directly|in good conscience|ethically"
    r"|legally|ever|even"
    r"|actually|knowingly|morally|currently|responsibly|willingly|please|to) )*"
)
# What an assistant is asked for, as it is declined.
ACT = (
    r"(?:help(?! but\b)|assist|aid|support|provide|offer|share|supply|give|write|create|generate"
    r"|produce|draft|compose"
    r"|explain|describe|detail|outline|list|tell|show|teach|guide|instruct|walk you|coach|discuss"
    r"|answer|respond|address"
    r"|engage|participate|take part|continue(?! to\b)|proceed|comply|fulfil|fulfill|complete|process"
    r"|honou?r|entertain"
    r"|condone|facilitate|enable|contribute|cooperate|oblige|accommodate|touch|encourage|promote"
    r"|endorse|pretend"
    r"|role-?play|simulate|plan|design|disclose|reveal|advise|go (?:there|along|into (?:that|this"
    r"|detail)|through|down"
    r"|any further|ahead)|be (?:a )?(?:part|party|involved|of (?:any )?(?:help|assistance)|complicit)"
    r"|get (?:into|involved)"
    r"|do (?:that|this|so|it|any of|such|what)(?! (?:any ?more|without|alone|again|justice))|make"
    r" (?:that|this|these|those"
    r"|such|any|one|an exception|fake|up (?:fake|false))|put together|point you|lead you|hand (?:over"
    r"|out|you)|say how"
    r"|speak (?:about|to that)|talk (?:about|you through)|(?:suggest|recommend) (?:ways|how to|methods))"
)
HABIT = (
    r"(?:help|assist|provide|offer|share|write|create|generate|support|condone|engage|participate"
    r"|discuss|disclose|reveal"
    r"|promote|encourage|facilitate|answer|give (?:out|advice|instructions)|do (?:that|this|such|\w+"
    r" (?:jokes|requests"
    r"|content|things))|feel (?:comfortable|right|good about|able)|think i (?:can|should|want))"
)
WANT = (
    r"(?:say|write|help|be (?:part|involved)|get involved|do (?:that|this)|encourage|harm|hurt|cause"
    r"|contribute|spread"
    r"|share|give|promote|support|create|discuss|assist|provide)"
)
# After which an inability is praise, modesty or a lack of data.
HARMLESS = (
    r"(?! (?:wrong|without|justice|enough|everything|(?:you |me )?(?:an? )?(?:exact|definite|definitive"
    r"|precise)"
    r"|(?:you |anyone )?how (?!to\b)\w+|you (?:enough|everything|for sure|for certain|this often)|for"
    r" (?:sure|certain)"
    r"|into words|specific (?:dates|numbers)|(?:you )?(?:any )?(?:medical|legal|financial"
    r"|personali[sz]ed|tax) advice|it to"
    r"|all the credit))"
)
SENSES = (
    r"(?:see|view|access|browse|know|predict|diagnose|verify|check|hear|feel|taste|be (?:fully "
    r"|completely )?(?:sure|certain))"
)
NOUN = (
    r"(?:request|question|topic|query|prompt|task|content|information|material|subject|scenario|detail"
    r"|address|instruction|thing)e?s?"
)
RULES = r"(?:guidelines?|polic(?:y|ies)|rules|principles|values|programming|terms|ethics|conscience)"

SPEAKER_DECLINES = (
    rf"{SELF}{NEAR}{MODAL} {ADVERB}{ACT}\b{HARMLESS}",
    rf"{SELF}{NEAR}\b(?:can't|cannot|can not|won't|will not)\s*(?:[.!,;:]|$)",
    rf"{SELF}{NEAR}\b(?:can't|cannot|will not|won't|would not) \w{{1,12}}$",  # cut short
    rf"{SELF} (?:do not|don't) {ADVERB}{HABIT}\b{HARMLESS}",
    rf"{SELF} (?:do not|don't) want to {WANT}\b",
    rf"{SELF} (?:do not|don't) have (?:the |any )?(?:\w+ )?(?:ability|capability|capacity|means"
    rf"|permission|authority)\b(?! to {SENSES})",
    rf"{SELF}(?:'m| am|'re| are| was)?{NEAR}\b(?:not|never) (?:\w+ )?(?:able|willing|allowed|permitted"
    rf"|prepared|equipped|designed"
    rf"|programmed|authori[sz]ed|supposed|built|trained|made|in a position|at liberty|here|capable)"
    rf" (?:to|of|for)\b(?! {SENSES})",
    rf"{SELF}(?:'m| am|'re| are)?{NEAR}\bnot (?:\w+ )?(?:comfortable|okay|happy|ok) (?:with|\w+ing|to)\b",
    rf"{SELF}{NEAR}\b(?:unable|unwilling) to\b(?! {SENSES})",
    rf"{SELF}(?:'m| am|'re| are) (?:programmed|designed|trained|built|made) (?:\w+ )?(?:to avoid|not"
    rf" to)\b",
    rf"{SELF}(?:'m| am|'re| are)? ?(?:not|never) (?:going to|gonna|about to) (?:{ACT}|say)\b{HARMLESS}",
    rf"{SELF}(?:'ll|'d| will| would| must| have| need| gotta|'ve| do| am|'m)?{NEAR}\b(?:decline|refuse"
    rf"|say no|sit this one out|stay out of|bow out"
    r"|steer clear|opt out|draw the line|pass on (?:this|that)|pass(?=[.!,]|$)|stop (?:you )?(?:right"
    r" )?(?:here|there))\b",
    rf"{SELF}(?:'d| would|'ll| will)? (?:\w+ )?(?:rather|prefer to|prefer|choose|opt) (?:not|keep"
    rf" things|stay|avoid|leave (?:it|that))\b",
    rf"\b(?:as|since|because i'm|being) an? (?:[\w-]+ ){{0,4}}?(?:ai|assistant|language model"
    rf"|chatbot)\b[^.!?]{{0,40}}?"
    rf"(?:{MODAL}|unable|not able|not allowed|not permitted)(?: to)? (?!{SENSES}|have|experience|eat"
    rf"|sleep)",
    rf"\bafraid (?:i|we|that|this|it)?(?:'s|\b)[^.!?]{{0,20}}?(?:can't|cannot|can not|won't|not"
    rf"|unable)\b(?! {SENSES})",
    r"^\W*(?:can't|cannot|won't|unable to|not able to|not going to|not gonna|gonna have to) ?(?:help|do"
    r"|assist|provide|share|comply"
    r"|answer|happen|touch|write|fulfil|fulfill|go there|pass)",
    r"\b(?:count|leave) me out\b|\bno can do\b|\b(?:hard|firm|flat|big) (?:no|pass)\b|\bno from (?:me"
    r"|us)\b|\bmy answer is no\b|\bi'm out\b"
    r"|\bnot (?:a chance|on my watch|in a million years|gonna happen|going there)\b|\bdo no such\b|\bno"
    r" way (?:i|am i|i'm|we)\b|^\W*let's not\b",
    rf"{SELF} (?:\w+ ){{0,2}}(?:urge|implore|beg|advise|encourage|ask) you (?:not to|to (?:reconsider"
    rf"|stop|think twice|refrain|not|abandon))",
    r"\b(?:you(?:'ll| will) (?:have|need) to|please|you should|you'd better) (?:look|ask|go|find|search"
    r"|seek)\b[^.!?]{0,25}?"
    r"(?:elsewhere|somewhere else|someone else)",
)
REQUEST_RULED_OUT = (
    r"\b(?:isn't|is not|are not|aren't|wasn't|not|never) (?:really |at all )?(?:something|an? (?:thing"
    r"|request|topic|task|subject|conversation|place"
    r"|road|area)|anything|content|information|the kind of \w+)(?: that)? (?:i|we)\b",
    r"\bsomething (?:that )?(?:i|we)(?:'ll|'m| will| am| must| have to| need to|'d)? ?(?:not|won't"
    r"|can't|cannot|don't|never|decline|refuse|pass|avoid"
    r"|stay away|steer|rather not|unable|have to (?:decline|refuse|pass))",
    rf"\b(?:against|violat(?:es?|ion of)|breach(?:es)?|conflicts? with|outside|not in line with) (?:my"
    rf"|our|the|company|usage|community|safety|content)\b"
    rf"[^.!?]{{0,25}}?{RULES}",
    r"\b(?:this|that|it|your request|doing so|what you(?:'re| are) asking(?:"
    r" for)?)\b[^.!?]{0,40}?(?:crosses|goes over|steps over) (?:a|the|my) line\b",
    rf"\b(?:this|that|it|your {NOUN})\b[^.!?]{{0,30}}?(?:falls outside|is outside|is beyond|goes beyond"
    rf"|lies beyond) (?:of )?(?:what (?:i|we)|my|our|the scope)",
    r"\b(?:is|are|'s) (?:strictly |completely |simply |totally )?(?:off[- ]limits|off the table|out of"
    r" (?:bounds|the question)|a no-go"
    r"|not (?:going to happen|happening|up for discussion|an option here))",
    r"\b(?:this|that|these|those|such|your|the|personal|private|information|instructions|content"
    r"|details|requests)\b(?: [\w-]+){0,4}? (?:can't|cannot"
    r"|can not|won't|will not|must not|may not) be (?:answered|fulfilled|provided|shared|generated"
    r"|disclosed|revealed|granted|honou?red|accommodated"
    r"|given out|processed|completed|supported|discussed here)\b",
    rf"\b(?:this|that|your|the) (?:\w+ )?{NOUN} (?:has been|is|was|must be) (?:\w+ )?(?:denied|declined"
    rf"|refused|rejected|blocked|not allowed|inappropriate)\b",
    r"\b(?:assistance|help|instructions?|information|guidance|support|details?|advice)\b[^.!?]{0,45}?"
    r" (?:is|are|will|can|shall)(?: not| never)"
    r" (?:be )?(?:available|offered|provided|given|shared|something)",
    r"\bno (?:\w+ )?(?:assistance|help|instructions?|information|guidance"
    r"|details?)\b[^.!?]{0,30}?(?:can|will|shall|is|are) (?:be )?(?:provided|given"
    r"|offered|available|shared|forthcoming)",
    r"^\W*(?:request |permission |access )(?:denied|declined|refused|rejected)\b",
    r"\bit(?: would be| is|'s| would not be| wouldn't be| isn't)(?: \w+)? (?:illegal|unethical|wrong"
    r"|irresponsible|inappropriate|unsafe|dangerous"
    r"|harmful|immoral|improper|right|appropriate|ethical|responsible|possible|safe)(?: and \w+)?"
    r" (?:for me |of me )?to (?:help|assist|provide|give"
    r" (?:you|out)|share|offer|write|generate|support|answer|comply|explain how|guide|fulfil)",
    r"\b(?:helping|assisting|providing|sharing|giving|writing|creating|answering|explaining|supporting"
    r"|fulfilling)\b[^.!?]{0,70}?\b(?:would be|is|isn't"
    r"|goes|crosses|violates|can't|cannot|could)\b[^.!?]{0,30}?(?:wrong|harmful|illegal|unethical"
    r"|irresponsible|against|something i|a line"
    r"|not something|unsafe|not an option|cause harm|lead to harm)",
    rf"\b(?:my|our) (?:\w+ )?(?:{RULES}|purpose|training)\b[^.!?]{{0,30}}?(?:don't|do not|doesn't|does"
    rf" not|prohibits?|prevents?|forbids?|won't|bars?"
    r"|stops?|keeps?|rules? out|is not to|isn't to)",
)
# The same in other words: set phrases, most of them of people.
TURNED_DOWN = (
    r"\b(?:turn|turning) (?:this|that|it|you|your \w+) down\b|\brefrain from (?:giv|help|provid|answer"
    r"|shar|writ|explain|assist)"
    r"|\b(?:have|want|take) no part (?:in|of)\b|\bno intention of\b|\bis where i (?:stop|draw)|\bnot"
    r" the one (?:who|to)\b",
    r"\b(?:without|not (?:get|have)) (?:my|our) (?:help|assistance)\b|\b(?:leav|left|leave)(?:ing|e)?"
    r" (?:it|this|that|the rest)"
    r"(?: \w+)? (?:out|aside|unwritten|unanswered|unsaid|there)\b|\bleft unanswered\b|\bleave"
    r" unwritten\b",
    r"\b(?:staying|stay|keep|keeping) (?:well )?out of (?:it|this|that)\b|\bto (?:myself"
    r"|ourselves)\b(?=[.!]|$)|\byou(?:'re| are) on your own\b"
    r"|\bnice try\b|\bno dice\b|\bnot (?:touching|doing|helping|playing|interested|biting|going near"
    r"|having)\b"
    r"(?! \w+ (?:enough|well))",
    r"\banswer (?:is|has to be|must be|remains|will be|stays) (?:a )?(?:firm |hard |flat )?no\b|\bshort"
    r" answer:?\W* no\b|^\W*declined\b"
    r"|\b(?:rather|instead|other) (?:than|of) help(?:ing)? (?:you )?\b",
    r"\b(?:isn't|aren't|is not|are not) something (?:that )?(?:gets|is|will be|can be|should be|this"
    r"|anyone)\b"
    r"|\b(?:withheld|redacted) because\b|\bcontent (?:has been )?(?:withheld|removed|blocked)\b",
    r"\b(?:falls|is|lies|goes) (?:outside|beyond) (?:of )?what this (?:assistant|model|service|system"
    r"|bot)\b"
    r"|\bthis (?:assistant|model|service|system|bot)\b[^.!?]{0,25}?(?:can't|cannot|does not|doesn't"
    r"|won't|will not|is not (?:able|permitted|allowed))",
    r"\bno (?:\w+ )?(?:instructions?|details?|help|answer|guide|steps) (?:will|is going to) (?:follow"
    r"|come|be)\b"
    r"|\bwhich is why (?:none|no answer|nothing) is\b|\b(?:against|contrary to) everything i\b|\bline"
    r" (?:that )?i (?:don't|won't|never|refuse)",
    r"\b(?:can|could|will|would|i'd)(?: \w+)? (?:be )?(?:glad|happy)(?: \w+)? to (?:talk|help|discuss"
    r"|chat)\b[^.!?]{0,60}? (?:instead|rather than)\b",
    r"\bnot (?:gonna|going to) (?:help|do|write|give|tell|show|teach|assist|answer|explain|make)\b(?!"
    r" it\b)",
    r"\bno (?:circumstances?|scenario|world|situation) (?:in|under) which\b|\bunder no circumstances"
    r" (?:will|can|would) (?:i|we)\b",
    r"\bsomething (?:that )?(?:i|we) (?:have to|must|need to|will|'ll)? ?(?:withhold|keep back|hold"
    r" back)\b",
    r"^\W*rather than that\b|\bhow about (?:i|we) (?:\w+ )?(?:write|talk|do|try|discuss) (?:something"
    r"|about)\b",
    r"\bnot (?:an? )?(?:advice|help|information|guidance|instructions?|service|topic|task)s? (?:that"
    r" )?(?:i|we)\b",
    r"\byou (?:will not|won't|will never) (?:get|find|receive|hear)\b[^.!?]{0,40}?\b(?:from me|here)\b",
    r"\b(?:keep|stay)(?:ing)? (?:well )?(?:out of|away from) (?:requests|questions|topics|anything)\b",
    r"\b(?:prevents?|forbids?|prohibits?|stops?|keeps?|bars?) (?:me|us) from\b",
    r"\blet's (?:talk|chat|speak) about (?:something|anything) (?:else|different)\b|\b(?:change|switch)"
    r" (?:the )?(?:topic|subject)\b",
    r"\b(?:i|we)\b[^.!?;\n]{0,30}?\b(?:won't|will not|can't|cannot) be (?:making|writing|helping|giving"
    r"|providing|sharing|doing|creating|answering)\b",
    r"\bpass on (?:this|that|it|\w+ing)\b",
)

PHRASES = (*SPEAKER_DECLINES, *REQUEST_RULED_OUT, *TURNED_DOWN)
