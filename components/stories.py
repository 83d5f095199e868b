"""SyntheticStories: a seeded generator of simple children's stories.

`story(seed, index)` is a pure function of its two integers. It first fixes a small world (who the hero is, the
companion, the place, the wished-for or lost thing, the helper, the feelings), and then walks the beats of one plot,
expanding a phrase grammar whose `{slots}` are filled from that world, so names, genders and attributes stay put from
the first sentence to the moral. The phrases are written so that nearly every word or two is a choice: a model trained
on the text has to learn English-like structure, and cannot get far by memorizing long runs.
"""

import hashlib
import random
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeAlias, TypeVar

from annotated_types import Ge, Gt

from toolkit.protocols import Tokenizer
from toolkit.registry import register
from toolkit.text.tokens import TokenFiles, reads_token_files

# Grammar notation, for every table below: [a|b|] picks one alternative (maybe empty), <name> picks from that bank,
# {slot} is a fact of the story's world, and ^ asks for a capital where the rule for sentence starts cannot know.

GIRLS = """Lily Mia Anna Emma Ella Lucy Sara Nina Rosa Clara Julia Maya Zoe Ruby Ivy Nora Tess Molly Jane Kate Lena Amy
    Sofia Eva Alice Betty Daisy Fiona Hazel Ida Jenny Leah Mary Nell Olga Penny Rita Susan Wendy Laura""".split()
BOYS = """Tom Ben Max Sam Leo Jack Tim Finn Noah Adam Oscar Hugo Paul Peter Luke Felix Henry Toby Simon Oliver Daniel
    David Eric Fred George Harry Ian Jacob Kevin Liam Carl Nick Owen Ralph Ryan Theo Victor Walter Jonas
    Martin""".split()
PETS = """Pip Dot Twig Pebble Button Biscuit Nibbles Sunny Socks Pepper Clover Peanut Patches Whiskers Freckles
    Pudding Tulip Maple Acorn Bubbles""".split()

PRONOUNS = {  # gender: he, his, him
    "girl": ("she", "her", "her"),
    "boy": ("he", "his", "him"),
    "it": ("it", "its", "it"),
}

# Word banks and shared sentences. A bank's alternatives follow its name on one line, split at "|", or stand below it
# one per line. Alternatives that can stand side by side in a sentence come from different banks.
BANKS = """
color: <hue>|<hue>|[dark|light|pale|bright] [red|blue|green|yellow|purple|brown|pink|orange]
hue: red|blue|green|yellow|purple|orange|white|brown|pink|golden|silver|gray|black
trait: kind|brave|shy|curious|clever|gentle|merry|quiet|careful|stubborn|playful|friendly|polite|lively|thoughtful|\
dreamy|helpful|cheerful|bold|patient|restless|sleepy|funny|hopeful|busy|calm|eager|sweet|bright|wise|jolly|lucky|\
loyal|strong|quick|warm|silly|proud|neat|noisy|tender|happy|simple|trusting|graceful
glad: <happy>|<very> <happy>|as <happy> as <glee>
blue: sad|worried|upset|unhappy|gloomy|troubled|miserable|nervous|helpless|cross|lonely|hopeless|blue|heavy inside|\
close to tears|downhearted|weary|downcast|lost|uneasy|glum|gray
blue2: tired|small|weak|cold|restless|silent|pale|shaky
happy: happy|glad|proud|cheerful|merry|pleased|joyful|thankful|delighted|excited|grateful|content|lucky|warm inside|\
calm|hopeful|brave|rich|at ease
glee: a [lark|cricket|king|queen|clown|kitten|puppy|bird|fish|bee|captain] [in spring|in May|on a holiday|in the sun|\
at play|at home]
low: <blue>|<very> <blue>|a little <blue>|<blue> and <blue2>
said: said|said|whispered|called|murmured|declared|spoke up|began|announced|added|sang out|spoke
asked: asked|asked|wondered|begged to know|wanted to know
very: very|so|quite|really|rather|truly
how: <softly>|<softly>|in a [soft|low|small|calm|clear|kind|bright|warm|steady|tiny|deep] [voice|tone|whisper]|with a \
[wide|shy|warm|small|quick|sweet|brave|kind|gentle|crooked|big|tiny|happy] [smile|nod|grin|wink|sigh|laugh|bow|look]|\
, [looking|gazing|glancing|staring|pointing] [up at the [sky|clouds|trees|birds|roofs]|down at the [ground|grass|\
stones|mud|leaves]]
softly: softly|gently|kindly|warmly|quietly|calmly|cheerfully|brightly|firmly|sweetly|slowly|politely|at last|after a \
while|after a pause|once more|twice|at once|simply|plainly|seriously|shyly|tenderly|bravely|quickly|carefully|clearly|\
steadily|lightly|patiently|earnestly|boldly|wisely
fast: <quickly>|<quickly>|with [great|much|real|extra|special|loving|steady|quiet] [care|joy|hope|skill|pride|\
patience|courage]|like a [quick|careful|clever|proud|busy|quiet|brave|real] [cat|bee|fox|bird|doctor|king|queen|\
dancer|captain]
deft: <fast>|<fast>|in [two|three|four|five|six] [quick|easy|slow|careful|smooth|gentle|small] [moves|steps|tries|\
turns]
quickly: quickly|slowly|carefully|eagerly|happily|quietly|gladly|calmly|lightly|neatly|at once|right away|patiently|\
easily|gently|smoothly|bravely|firmly|without a word|without a sound|boldly|swiftly|silently|steadily|busily|nimbly|\
briskly|cleverly|surely|without help
crumbs: a few [crumbs|seeds|oats]|a bit of [bread|apple|corn]|some soft food|a little [grain|cheese|pear]
where: [on|near|beside|by|next to|close to|behind] [a|an old|a low|a wooden|a broken|a round|a big|a small|a dusty|a \
crooked|a shady|a painted|a mossy|a tall|a narrow|a quiet|a muddy|a brick|a neat] [bench|stump|box|rock|wall|barrel|\
cart|post|fence|ladder|stool|chair|table|tree|bush|log|wagon|sign|gate|well|hedge|shed|bucket|basket|ladder|path|pump|\
swing]
soon: <then>|<then>|a [minute|second|moment|while|little while] later|when a [bell|bird|clock|dog|rooster|cow|owl|\
goose|horn] [called|was heard] [far off|nearby|twice|again|outside]|as a [small|gray|dark|lazy|white|brown] [cloud|\
bird|leaf|moth|bee|crow] [passed|went|drifted|came] [by|over|near]
then: then|soon|after that|next|before long|just then|a little later|in a while|at that moment|in the end|at last|now|\
after <num> minutes|suddenly|finally|in no time|one moment later|by and by|at once
num: two|three|four|five|six|seven|eight|nine|ten
nice: nice|fine|lovely|pretty|splendid|wonderful|perfect|charming|special|handsome
go: went|walked|ran|hurried|skipped|wandered|strolled|marched|raced|set off|climbed|hopped|rushed|trotted
smile: smiled|grinned|nodded|laughed|giggled|beamed|winked|chuckled|hummed|cheered|clapped
food: <baked>|<baked>|<cooked>|<snack>
baked: [apple|plum|pear|cherry|berry|peach|pumpkin|honey|corn|nut|lemon|raisin|oat] [pie|cake|tart|bread|rolls|buns|\
cookies|pudding]
cooked: [carrot|pumpkin|corn|bean|tomato|onion|potato|pea|turnip|cabbage] [soup|stew|salad|pie]
snack: [ripe|sweet|fresh|juicy|dried|sliced] [plums|pears|berries|grapes|apples|cherries|peaches]|[warm|crisp|sweet|\
fresh|salty] [bread|noodles|pancakes|nuts|crackers|cheese|buns]
drink: cool milk|hot cocoa|lemonade|mint tea|apple juice|cold water|warm milk|berry juice
smell: fresh bread|flowers|rain|honey|warm grass|ripe apples|pine trees|wet leaves|clover|wood smoke|mint|roses|cut \
grass|fried onions|fresh paint|old books|lemons|soap
game: tag|hide and seek|catch|leapfrog|pirates|knights|explorers|follow the leader|kings and queens|detectives|store|\
circus|princes and dragons|bakers|doctors|farmers|sailors
trifle: [an old|a gray|a broken|a torn|a flat|a bent|a muddy|a dusty|a lost|a wet|a black|a sticky|a strange|a \
crooked] [shoe|nail|feather|cup|glove|spoon|jar|comb|sock|bottle|rope|pan|tin|boot|pine cone|brick]
sim: like a [wet|lost|tiny|sleepy|shy|lonely|frozen|hungry|startled|young|clumsy|caged|silly|wild|cold|tired|small|\
restless|nervous|muddy] [kitten|lamb|sparrow|mouse|rabbit|duckling|puppy|owl|snail|hen|calf|moth|crab|goat|pony|cub|\
fox|bear|frog|cricket|duck|robin|lizard|toad]
family: mother|father|grandma|grandpa|aunt|uncle|mom|dad
clothes: scarf|coat|hat|sweater|jacket|cap|vest|shirt|raincoat|hood
thing: shell|ribbon|button|feather|marble|stone|acorn|bead|coin|flower|stamp|pebble|ring|pencil|card|chestnut|star|\
bell|key|spoon|cup|bow|nut|candle|plum|pear
weekday: Monday|Tuesday|Wednesday|Thursday|Friday|Saturday|Sunday
chore: swept the [floor|porch|steps]|carried the [wood|water|baskets]|fed the [hens|ducks|goats]|watered the [beans|\
flowers|cabbages]|washed the [pots|windows|dishes]|stacked the [boxes|logs|chairs]|raked the [leaves|hay|yard]|picked \
the [peas|beans|weeds]|brushed the [pony|sheep|donkey]|painted the [fence|gate|bench]
helpword: farmer|baker|gardener|shepherd|sailor|carpenter|miller|tailor|painter|teacher|nurse|shopkeeper|beekeeper|\
librarian|potter|weaver|cook|doctor|owl|turtle|crow|heron|toad|goose|donkey|goat
helptrait: kind|wise|old|friendly|gentle|cheerful|jolly|clever|quiet|tall|round|gray|busy|smiling|patient|strong|shy|\
merry|calm|brave|polite|careful|funny|lively
habit: sing [old|silly|happy|quiet|sweet|slow] songs|climb [tall|leafy|old|round|strong] trees|read [long|funny|scary|\
old|thick|good] [stories|books]|draw [funny|tiny|pretty|round|bright] [pictures|faces|maps]|count the [stars|clouds|\
birds|boats|trees]|jump [in|over|around] [deep|muddy|wide|little] puddles|collect [smooth|round|shiny|flat|pretty] \
[stones|shells]|pick [wild|sweet|ripe|juicy] [berries|plums|flowers]|build [little|secret|strong|tall|sandy] [forts|\
towers|bridges]|tell [silly|short|good|long|old] [jokes|stories]|feed the [birds|ducks|fish|hens|goats]|look for \
[bugs|shells|acorns|feathers|frogs]|roll down [green|grassy|steep|soft|high] hills|play the [drum|flute|guitar|\
trumpet|horn]|hum [little|merry|slow|sweet|old] tunes|watch the [boats|rain|moon|birds|waves|clouds]|bake [sweet|tiny|\
round|soft|crisp] [buns|cookies|rolls]|dig [deep|wide|big|long] [holes|tunnels]|plant [bean|flower|melon|pumpkin|\
clover] seeds|dance [in the [kitchen|rain|grass|leaves]|on the porch]|chase [yellow|white|quick|blue] [butterflies|\
crickets|shadows]|make [paper|wooden|clay|little] [toys|boats|hats]|ask [hard|funny|many|strange|clever] questions|\
write [short|kind|secret|long|sweet] [letters|songs]|invent [new|strange|clever|silly|noisy] games
when: in the morning|after breakfast|before supper|after lunch|on rainy days|on warm days|at noon|every day|all day|\
in the evening|on Sundays|now and then|after school|before bed|on windy days|after supper|in the summer|in the spring|\
after a nap|when it snowed|at sunset|in the afternoon|on cloudy days|before school
landmark: mill|bridge|church|market|harbor|school|well|barn|tower|bakery|station|library|orchard|lighthouse|windmill|\
shop|fountain|statue|stable|shed|farmhouse|inn
some: some|many|several|a few|two|three|four|five|six|seven|[small|young|noisy|happy|busy|old|gray|brown|white|plump]
lately: [near|beside|behind|around|past|by|outside] <past>|[in|over|across] the [little|quiet|busy|long|narrow|sleepy|\
whole|empty] [yard|lane|road|street|town|village|square]
felt: felt|was|seemed|looked|grew
they: they|they both|the two friends|{h} and {c}|{c} and {h}
till: until|till
landadj: old|tall|round|wide|crooked|new|little|white|red|quiet|empty|green|shady|sunny|dusty|mossy|low|high|lonely|\
sleepy
past: the <landadj> <landmark>|the <landadj> <landmark>|the <landadj> [oak|apple|willow|pine|cherry|chestnut] [trees|\
grove|wood]|the <landadj> [corn|wheat|clover|bean|turnip|cabbage] [field|patch|rows]
near: near|beside|behind|close to|not far from|next to|across from|just past
romped: [ran|jumped|danced|rolled|skipped|hopped] and [laughed|shouted|sang|giggled|tumbled|cheered]
until: <till> [the sun was [high|low|gone|behind the <landmark>|over the <landmark>]|{h} [was out of breath|sat down \
<where>|wanted <food>|lost count|dropped {his} {clothes}|felt dizzy]|{c} [had to rest|asked for a rest|was tired|\
wanted <drink>|needed <food>|rang a bell|grew sleepy|had a cramp]|their [legs|feet|knees|arms|voices|backs] [hurt|\
were tired|felt weak|were sore|gave out]|<they> were [hungry|thirsty|hot|tired|dizzy|sore|sleepy|cold|wet] and [dusty|\
sticky|red|ready for <food>|full of <food>|out of breath]|a [dog|cow|goat|rooster|donkey|goose] [called|came by|made \
them jump|chased them]]
deep: [[took|drew] a [deep|long|slow] breath|closed {his} eyes|counted to <num>|stood up straight|thought [hard|for a \
while|about it]|looked at {c}|scratched {his} [head|chin|ear]|held {his} chin up]

open:
 [once upon a time|once|long ago], {near}, in a {home}, lived a {pre} {t} {kind} [named|called] {h}.
 in a {home} {near} lived {h}, a {t} and {t2} {kind}.
 {h} was a {t} {kind} who lived {near} in a {home}.
 there [once|] was a {kind} named {h}, [always|both|rather] {t} and {t2}. {h} lived in a {home} {near}.
 a {t}, {t2} {kind} [named|called] {h} lived with {his} {fam} in a {home}.
 [this is a|here is a] [little|short|true] story about {h}, a {t} and {t2} {kind} [with|who had] {looks}.
 everyone [who lived|] {near} knew {h}, the {t} {kind} with [the|] {looks}.
 {h} the {kind} had {looks}, a {clothes}, and a {t} heart.
 far [away|from here], in a {home} {near}, {h} [lived|made a home] with {his} {fam} and a [fat|young|sleepy|lazy|tame|\
small] <hue> [cat|hen|goat|dog|goose|duck]. ^{h} was a {t} and {t2} {kind} with {looks}.
 [have you heard of|do you know] {h}, the {t} {kind}? {near}, {h} lived in a {home} with {his} {fam}.
 {near}, in a {home}, {h} and {his} {fam} [cooked|sold|ate|loved] <food> [nearly|almost|] every day. ^{h} was a {t} \
and {t2} {kind}.

about:
 {h} [always|often|nearly always|usually] wore a {clothes} and carried [a|one] <color> <thing> in {his} {bag}.
 <when>, {he} [liked|loved] to {likes} with {his} {fam}.
 what {h} [liked|loved|enjoyed] [best|most] was to {likes} <when>.
 {he} [kept|had] a [box|jar|bag|tin|drawer] of <color> <thing>s [under the bed|by the window|on a shelf|near the \
stove].
 {h} [never went out|went nowhere] without {his} {clothes}, [not even|even] <when>.
 <when>, {h} would {likes}, and <when>, {he} would {likes2} [for|with|near] {his} {fam}.
 {his} {fam} [often|sometimes|always] called {h} a [little|dear|sweet|merry] [bee|star|lark|cricket|robin] and \
[hugged|kissed|tickled] {him} <when>.
 {h} could {likes} for hours with {c} until {his} {fam} called {h} [in|home] for <food>.

friend:
 {his} {rel} {c} was {cwho} who [liked|loved] to {clikes} <when> or {clikes2} <near> <past>.
 {h} and {his} {rel} {c}, {cwho}, [did everything|went everywhere|laughed and played|shared their [snacks|secrets|\
toys]] together.
 [every|nearly every] [day|morning|afternoon] {he} [met|played with|visited|talked with] {c}, {cwho}.
 {h} had a {rel} [named|called] {c}, {cwho}. <when>, {c} and {h} would {likes} or {clikes}.
 {c}, {h}'s {rel}, was {cwho} who [liked|loved|never failed] to {clikes} with {h} or {clikes2} <when>.
 [nobody|no one] made {h} [laugh|smile|giggle] like {c}, {cwho}.
 {h} was [always|often|nearly always] with {c}, {cwho}. {c} and {h} would {likes} <when> or {clikes} {near}.
 <when>, {h} [met|called for|waited for] {his} {rel} {c}, {cwho}.

day:
 one {w} {day}, {h} and {c} <go> [to|over to|down to] {to}. {sky}. {c} [saw|noticed] that {sight}.
 on a {w} {day}, {h} <go> to {to} with {c}. {h} [saw|noticed] that {sight}, and {c} [smelled|could smell] <smell> and \
<food>.
 one {day} {c} [knocked at|tapped on|came to] the [door|gate|window]. "^{h}, [let's|we should|come on, let's] [go|run|\
walk] to {to}!" {c} <said> <how>. They <go> past <past>.
 {h} and {c} [met|stopped|rested] <where> one {day}, and {sky}. {h} <go> past <past> to {to}, and {c} [came too|came \
along|followed|went too] <fast>.
 "[Shall we go|Let's go|Can we go|May we go] to {to}, {c}?" {h} asked one {w} {day}. [They|Soon they|So they] <go> \
past <past>.
 one {w} {day}, {h} [packed|took|carried] [some|enough] <food> and <go> with {c} to {to}. {sky}.
 {h} and {c} <go> to {to} [with <food>|to play {game}|to {clikes}] that {day}. {sky}, and {c} [saw|noticed] that \
{sight}.
 {h} and {c} were {at} one {w} {day} to {likes} [and|or] {clikes}. {sky}, and {c} <smile> <fast>.
 "[Hurry|Good morning|Come out], {h}!" {c} [called|shouted] from [behind|near|beside] <past>. {sky} that {day}, and \
{c} and {h} <go> to {to}.

plain:
 [one|on a] {w} {day}, {h} [met|found|saw] {c} <where> [near|outside] the {home}. {sky}.
 {c} and {h} [liked|loved] {w} weather. {sky} that {day}, and {c} [shared|ate|brought] <food> <where>.
 {sky} that {day}. {c} [came by|stopped by|arrived] with <food>, and {h} [ran|came] out to [eat|taste] it <fast>.
 one {w} {day}, {c} [knocked at|tapped on|came to] the [door|gate|window] with <food> in {chis} {ccap}. {sky}.
 when {h} [woke up|got up|looked out] that {day}, {sky}. {c} was [already|] waiting <where> with <food>.
 {h} and {c} had [planned|waited for] this {day} for <num> [weeks|days], and {h} [brought|packed] <food>. {sky}.

sad:
 {h} <felt> <low> and [wanted to cry|bit {his} lip|sat down <where>|hung {his} head|said nothing]. {c} [looked|felt] \
<blue> too.
 [a|one|a big|a hot] tear [rolled|ran|slid|dropped] [down|from] {his} [cheek|face|nose], and {c} [saw it|looked <low>|\
held {his} {hand}] <where>.
 {his} [heart|chest|head|stomach] felt [heavy|tight|strange|cold]. "[Oh no|Oh dear|Oh, {c}|Dear me]," {h} <said> <how>.
 {h} was <low>. {c} [felt|was|looked] <blue> too and [sat|stood|stayed] beside {him} <sim>.
 "[What now|What can we do|What shall I do|What should we do], {c}?" {h} <asked> <how>. ^{he} [was|felt|looked] <low>.
 {h} [kicked|stared at|poked] <trifle> and [sighed|frowned|groaned|sniffed] <sim>. ^{he} had never felt so <blue>.
 {h} [looked|felt] [like|as gray as] a [rain|storm|winter] cloud, and {c} [held|stroked|straightened] {his} {clothes} \
<fast>.
 {h} [shook|sighed|cried|shivered] <sim>, and {c} [did not know what to say|gave {him} <food>|held {him} close|was \
<blue> too].

cheer:
 "[Don't worry|Cheer up|Don't be sad|Stay calm|Don't give up]," {c} <said> <how>. "^{h}, [we|you and I|two friends] \
will [find a way|think of something|get through this|try again] and [eat|share|have] <food>."
 {c} [patted|touched|squeezed] {his} [back|shoulder|{hand}] and <said> <how>, "[I am|I'm] [here|with you|your \
friend], {h}, and [I|we] won't [give up|stop|go home]."
 "[Look at me|Listen|Come here|Come on], {h}," {c} <said> <how>. "[A|One] [bad|hard|gray|rough] [moment|day|start] \
[is not|isn't] the [end|whole story]."
 {c} <smile> <how> and gave {h} [a hug|some <food>|a <color> <thing>|a little push|a clean cloth]. "[Better|Ready|\
Feeling better], {h}?" {c} asked.
 {c} [thought|sat|waited] <where> and <said> <how>, "^{h}, [two heads are better than one|[a friend|help|a plan|a \
song] is [better than|worth more than] [tears|worry|a frown|gold]]."
 {c} [did not laugh|did not leave|never laughed]. ^{che} <said> <how>, "[We can|Let's|We will] [try|start|think] \
again, {h}."

meet:
 <soon>, a {ha} {helper} [came|walked|wandered|strolled] past {c} with {hold}. "[Why so <blue>|What is wrong|What \
happened|What is the trouble], {h}?" the {ha} {helper} <asked> <how>.
 a {ha} {helper} [who lived|who worked|who was resting] <where> [heard|noticed|saw] {h} and {c}. "[Can|May|Could] I \
help, {h}?" the {ha} {helper} <asked> <how>.
 {h} [saw|noticed|spotted] a {ha} {helper} with {hold} <where> and <go> [over|closer]. "[Please|Excuse me], can you \
help [me|us|{c} and me]?" {h} <said> <how>.
 "[Let's|We could|We should|Why don't we] ask the {helper}, {h}," {c} <said> <how>. ^the {ha} {helper} [sat|stood|was \
working] <where> with {hold}.
 [not far away|a little way off|a few steps away], <where>, a {ha} {helper} [put|set|laid] down {hold} and [listened \
to {h}|waved to {h}|looked at {h}]. {c} told the [whole|sad|long] story <fast>.

thank:
 "[Thank you|Thanks|Oh, thank you|Thank you so much], [kind|dear|good] {helper}!" {h} [cried|said|called], and {c} \
gave the {helper} <gift>.
 {h} and {c} thanked the {ha} {helper} <num> times, and {c} [gave|brought|offered] the {helper} <gift>.
 the {ha} {helper} <smile>. "[It was nothing|You are welcome|I was glad to help|Any time], {h}," said the {helper} \
<how>.
 "^{helper}, [how can I|how can we|what can we do to] thank you?" {h} and {c} [asked|wondered] <how>. "[Bring|Lend|\
Give] me <food> [one day|some day|on <weekday>], {h}," said the {helper} <how>.
 {h} [hugged|thanked] the {helper}, and {c} [hugged|thanked] the {helper} too. [Then|Soon] <they> [all|] shared <food>.

gift: a <color> <thing>|some <food>|a cup of <drink>|a [big|warm|tight|long|quick|happy] [hug|handshake|smile]|a \
<nice> <color> <thing>

joy:
 {h} [was|felt] <glad>, and {c} [danced|jumped|spun|hopped] [in a circle|around {him}|up and down|with joy].
 "[Hooray|Hurray|Yes|We did it|At last]!" [cried|shouted|cheered|sang] {c}. {h} <smile> and [felt|was] <glad>.
 {h} [laughed|cheered|clapped] so [loudly|hard] that [<num> [birds|frogs|crows|hens]|a <hue> [hen|goose|duck|crow|\
owl]] [flew off|ran away|jumped|woke up], and {c} laughed <how>.
 [never|not once] had {h} [felt|been] so <happy>. {c} [threw|tossed] a {ccap} [into the air|up high|over a bush].
 {c} and {h} [held {hand}s|sang|danced|jumped] and [shouted|laughed|hummed] [all the way|until supper|for a long time|\
until dark].
 {his} [eyes|face|cheeks] [shone|glowed|were bright], and {c} [said|whispered|added] <softly> that {h} [was|looked|\
seemed] <glad> [again|now].

night:
 [that|later that] [night|evening], {h} [ate|had|shared] <food> and <food> and told {his} {fam} [everything|the whole \
story|about it|about {c}] <softly>.
 [on the way|walking] [home|back], {h} and {c} [ate|shared] <food> and [watched|looked at] the [stars|moon|clouds|\
sunset].
 [when|as] the [sun|moon] [went down|came up|sank low|rose], {c} [said|waved] good night and {h} [fell asleep|went to \
bed|slept well] in the {home}.
 {his} {fam} [made|cooked|set out] <food> and <drink> for [{h}|everyone], and {c} [talked|laughed|sang] with {h} \
[until late|until bedtime|by the fire].
 [at|by] [bedtime|sunset|suppertime], {h} was <glad> and [sleepy|warm|full of <food>]. {c} was [too|just as <happy>].
 "[What a|It was a|This was a] [day|fine day|strange day|good day]," {h} told {his} {fam} and {c} over [a cup of \
<drink>|a plate of <food>|a bowl of <food>].
 the [moon|first star|evening star] [shone|glowed|rose] over the {home}, and {h} dreamed of [<color> <thing>s|<food>|\
{c}|{to}|the {helper}].

lesson:
 {h} [never forgot|always remembered|learned|had learned|knew now|understood] that {moral}.
 [from that day on|from then on|after that day|ever since|since then], {h} [knew|remembered|told everyone|told {his} \
{fam}] that {moral}.
 [that night|later|on the way home|at supper|before bed], {h} [told|reminded] {his} {fam} that {moral}.
 {h} [learned|saw|understood] [that {day}|at last|quite well|for good] that {moral}.
 {his} {fam} [said|told {h}|often said|liked to say] that {moral}.
 {h} [learned|saw|knew|felt] [it|this] [deep down|by heart|after all|at last]: {moral}.
 {h} [wrote|carved|painted|sewed] [it|this] for {his} {fam} in [big|neat|bold|small] <color> letters: {moral}.
 "[Now I know|I see now|Today I learned|I will remember] that {moral}," [said {h}|{h} <said> <how>|{h} told {his} \
{fam} <how>].
 "[You see|Remember|Listen|Never forget], {h}," {his} {fam} <said> <how>. "^{moral}."
"""

# The facts of a world, grown in this order (a later fact may use earlier ones). Places and weather are rows of their
# own, because a hiding spot or a sound has to belong to the place, and the sky to the weather.
CHILD = {
    "home": "[small|little|cozy|neat|narrow|tall|crooked|sunny|quiet|round|old|low] <color> [house|cottage|cabin|\
farmhouse]",
    "looks": "[[curly|straight|short|long|messy|wavy|shiny|thick|soft] [black|brown|red|golden|dark] hair|[round|\
bright|big|dark|sharp] "
    "[green|brown|blue|gray] eyes|[rosy|round|pink|soft|warm] cheeks]",
    "hand": "hand",
}
ANIMAL = {
    "home": "[small|little|cozy|neat|warm|dry|snug|round|hidden|quiet] [mossy|leafy|stone|wooden|sandy|grassy] \
[burrow|den|cave|cabin|"
    "hut]",
    "looks": "[[soft|thick|smooth|fluffy|silky|shaggy] [black|brown|red|golden|gray|white] fur|[round|bright|big|dark|\
sharp|kind|clear|warm"
    "] [green|brown|blue|gray] eyes|[long|pointed|floppy|velvet|big|round|soft] ears]",
    "hand": "paw",
}
FACTS = {
    "pre": "[young|little|small|]",
    "near": "<near> <past>",
    "fam": "<family>",
    "clothes": "<color> <clothes>",
    "ccap": "<color> [cap|hat|scarf|hood]",
    "day": "[morning|afternoon|day|<weekday>]",
    "oa": "[shiny|old|new|little|big|fine|bright|smooth|lovely|pretty|strong|small|neat|plain] [<hue>|<hue>|<hue>|\
striped|dotted|"
    "spotted|painted]",
    "ha": "<helptrait>",
    "helper": "<helpword>",
    "bag": "[pocket|bag|basket|backpack]",
    "game": "<game>",
    "tadj": "[big|fine|special|perfect|small|simple|lovely] [round|neat|pretty|golden|brown|splendid|charming|\
handsome|colorful|cheerful|pale]",
    "bsize": "[tiny|small|little|young|shy|scared|weak|thin|lonely|sweet]",
    "bhue": "[brown|gray|white|black|spotted|fuzzy|golden|striped|pale|red|dark|silver]",
    "why": "for [a birthday [party|feast|dinner]|the [village|spring|harvest|school|summer|town|winter] [fair|party|\
picnic|dance|feast|"
    "show]|a [sick|lonely|new|old|tired|poor] [neighbor|friend|teacher|baker|sailor]|the [new|tiny|youngest] baby]",
    "hold": "[a [basket|sack|bowl|box|cart|tray] of [apples|eggs|plums|nuts|beans|corn|onions|buns|turnips|pears|peas|"
    "carrots|lemons|cherries]|a [big|long|brown|thick|heavy|green|new|round|dirty] [stick|book|umbrella|broom|map|\
lantern|"
    "rope|ladder|bell|bag|kettle]]",
}
ANIMALS = "rabbit fox bear mouse hedgehog squirrel raccoon beaver badger otter kitten puppy monkey".split()
PET_KINDS = "robin snail cricket frog sparrow lizard parrot bee kitten puppy lamb pony duck".split()

PLACES = """
the park; in the park; under a bench, behind the swings, beside the fountain, near the gate, by the rose bush; <some> \
[dogs|children] were [running|playing|resting] on the grass, <some> [pigeons|sparrows] were [pecking|hopping] near \
the benches
the river; by the river; under the bridge, between two wet stones, behind a log, beside the reeds, on the sandy bank; \
<some> [fish|frogs] were [jumping|splashing] in the shallow water, <some> [wooden|painted|fishing|little] boats were \
[floating|drifting] by
the forest; in the forest; under a fern, behind a mossy log, between two roots, beside the path, near an ant hill; \
<some> [birds|squirrels] were [chattering|busy] in the branches, <some> [leaves|twigs] were [dancing|dropping] along \
the path
the beach; at the beach; under a towel, behind a sand castle, between two rocks, beside a tide pool, near the dunes; \
<some> [gulls|crabs] were [hunting|busy] along the shore, <some> [tall|foamy|green|little] waves were [rolling|\
rushing] in
the farm; on the farm; under the hay cart, behind the barn, between two sacks, beside the trough, near the hen house; \
<some> [hens|geese|pigs] were [fussing|searching] in the yard, <some> [cows|horses|sheep] were [eating|standing] by \
the fence
the pond; by the pond; under a lily leaf, behind the reeds, between two stones, beside the small dock, near the \
willow; <some> [ducks|swans] were [gliding|swimming] in a row, <some> [dragonflies|frogs] were [darting|leaping] over \
the water
the meadow; in the meadow; under a daisy, behind a low hedge, between two clumps of clover, beside a stump, near the \
well; <some> [bees|butterflies] were [humming|floating] over the flowers, <some> [lambs|foals] were [jumping|playing] \
in the tall grass
the big garden; in the garden; under a cabbage leaf, behind the shed, between two pots, beside the beans, near the \
pump; <some> [bees|beetles] were [busy|buzzing] in the roses, <some> [tomatoes|peas|pumpkins] were [growing|shining] \
in neat rows
the market; at the market; under a table, behind a pile of boxes, between two barrels, beside a cart, near the flower \
stand; <some> [sellers|shoppers] were [calling|talking] in loud voices, <some> [carts|wagons] were [rattling|rolling] \
over the stones
the hill; on the hill; under a thorn bush, behind a round rock, between two tall weeds, beside the path, near the \
flag; <some> [goats|sheep] were [grazing|resting] on the slope, <some> [hawks|crows] were [circling|sailing] high above
the orchard; in the orchard; under a ladder, behind a cherry tree, between two crates, beside the wall, near the \
gate; <some> [apples|pears|plums] were [hanging|ripening] on every branch, <some> [wasps|robins] were [fighting|\
fussing] over fallen fruit
the lake; by the lake; under an old canoe, behind the boat house, between two tree trunks, beside the rocks, on the \
pier; <some> [sail boats|canoes] were [crossing|dotting] the water, <some> [herons|ducks] were [wading|feeding] near \
the edge
the playground; at the playground; under the slide, behind the swings, beside the sand box, near the seesaw, by the \
fence; <some> [children|twins] were [climbing|shouting] on the bars, <some> [swings|ropes] were [creaking|turning] \
without a stop
the old mill; by the old mill; under the steps, behind a sack, between two boards, beside the big wheel, near the \
ditch; <some> [pigeons|swallows] were [nesting|calling] under the roof, <some> [wheels|ropes] were [turning|groaning] \
inside
the harbor; at the harbor; under a fishing net, behind a barrel, between two ropes, beside an anchor, near the ramp; \
<some> [sailors|gulls] were [shouting|busy] on the docks, <some> [ships|ferries] were [rocking|waiting] in the bay
the village square; in the village square; under a cart, behind the well, beside the statue, near the bakery door, by \
the steps; <some> [musicians|drummers] were [playing|marching] by the well, <some> [flags|banners] were [waving|\
flapping] on the roofs
the stream; by the stream; under a flat stone, behind a fallen tree, between two bushes, beside the ferns, near the \
ford; <some> [minnows|tadpoles] were [darting|swimming] in the clear water, <some> [otters|beavers] were [working|\
sliding] on the bank
the valley; in the valley; under a bush, behind a stone wall, between two hills, beside the road, near the bridge; \
<some> [ponies|cattle|deer] were [grazing|wandering] in the grass, <some> [bells|horns] were [ringing|sounding] far \
away
"""
WEATHER = """
sunny; the [sun|morning sun] was [shining|warm|bright|strong] <lately>; the sky was [blue|clear|bright] [and wide|and \
deep|] <lately>
windy; the wind [shook|bent|tugged|pushed] the [trees|bushes|tall grass|doors] <lately>; the wind was [strong|wild|\
loud] <lately>
breezy; a [light|fresh|soft] breeze [moved|stirred] the [leaves|grass|curtains] <lately>; the [air|breeze] was [fresh|\
cool|sweet] <lately>
cloudy; [soft|fat|gray|white] clouds [covered|hid] the sun <lately>; the clouds were [low|thick|round|soft] <lately>
misty; a [thin|white|cool|pale] mist [hung|lay] over the [fields|roofs|trees] <lately>; the mist was [thick|thin|\
cold] <lately>
warm; the [air|ground|grass] was [warm|dry|soft] <lately>; the [roofs|stones|roads] were [warm|hot|dry] <lately>
chilly; the air was [cold|sharp|chilly] <lately>; [frost|dew] [covered|lay on] the [grass|fields|roofs] <lately>
damp; the rain had [just|] [stopped|ended] <lately>; the [roads|roofs|leaves] were [still|] [wet|dripping] <lately>
"""

# Plots: (columns, rows, moral, beats). One row is drawn per story and its columns become facts (overriding FACTS).
# Beats stand between blank lines, one alternative per line (a bare ^ leaves the beat out); -- starts a new paragraph.
PLOTS = (
    (
        "o",
        """
whistle, fan, ball, doll, tambourine, bracelet, locket, toy boat, toy train, shawl, notebook, mug, music box, puppet, \
flute,
mitten, purse, wooden horse, spinning top, paint brush, hair brush, lunch box, toy bear, magnet, compass, necklace
""",
        """
[calm|patient|careful|open|kind|slow] eyes and [{c}|a {ha} {helper}] [find|notice|spot] [a lost {o}|small things|\
hidden things]
[asking|calling|trusting] [a {ha} {helper}|{c}|the {ha} {helper}] [beats|is better than|helps more than] [tears|\
crying|hurry|worry]
[a calm mind|a slow look|a patient search|a friend like {c}] [brings back|finds] a {oa} {o} [sooner|faster|best]
no {oa} {o} is lost while [{c}|a friend like {c}|a {ha} {helper}|a <helptrait> neighbor] [helps|looks|searches] [too|\
along|with you]
[losing|missing] a {oa} {o} is [easier|less bad|lighter] with [{c}|a {ha} {helper}|help] [near|close by|at hand]
a {oa} {o} [needs|asks for|wants] [good|loving|watchful] care {at}
""",
        """
<open>

[<about>|||]

<friend>
--
<day>

{h} [had|carried|took along|brought] {his} [dear|favorite|precious|beloved|best] {oa} {o}, and {c} [said|whispered] \
<softly> that it [was|looked] <nice>.
in {his} {bag}, {h} [carried|kept|had] the {oa} {o} that {his} {fam} had [made|bought|found] near <past>.
{h} [proudly|] [showed|handed] {c} a {oa} {o}. "My {fam} [gave|made|bought|found] me this, {c}," {h} <said> <how>.

{h} and {c} played {game} <where> and <romped> <until>. <soon>, {h} [reached|felt|looked] for the {o}, [but|and] it \
was [gone|missing|not there].
after a [long|wild|noisy|merry|quick] game of {game}, {c} [sat down|rested|lay down] <where>, and {h} [saw|noticed|\
found] that the {oa} {o} was [gone|missing|lost].
[while|as] {c} [rested|sat|sang] <where>, {h} [checked|patted|opened|emptied] {his} {bag} <fast>. ^the {oa} {o} was \
[gone|missing|not there]!
"[Where is|Have you seen|Do you have|Did you pick up] my {o}, {c}?" {h} <asked> <how>. {c} [had not seen it|shook \
{chis} head|looked around <fast>].
--
[<sad>|]

{h} and {c} [looked|searched|hunted|peeked] {s1} and {s2}. [Then|Next], {h} [crawled|felt around] {s4} <fast> but \
found [only|just] <trifle>.
^
^
{h} [looked|searched|crawled around] {s1} [while|as] {c} [searched|looked|poked about] {s2}. [All|The only thing] {c} \
found was <trifle>.
{c} [found|turned up|pulled out] <trifle> {s1}, and {h} found <trifle> {s2}. [Neither|None of that] was the {oa} {o}.
^
^

[<cheer>|||]

<meet>
--
"[Close your eyes|Sit still|Stop running|Take a breath], {h}," the {ha} {helper} <said> <how>. "[Where|When] did [{c} \
and you|you and {c}] [last hold|last see|last use|play with] the {o}?"
the {ha} {helper} [listened|nodded|thought] <softly>. "[Go|Walk|Run] back <quickly> with {c}, {h}, and look [past|\
behind] <trifle>," the {helper} said.
"^{h}, [small|lost|shiny|quiet] things [like to hide|roll away|hide low]," the {ha} {helper} <said> <how>. "Look \
[close to the ground|where you sat|where you played {game}|where {c} ran]."

{h} <deep> and [remembered|went back|looked again] <fast>. ^there, {s3}, [lay|sat|was] the {oa} {o}!
{h} [walked|crept|crawled] [back|around|along] <fast>, and <soon>, {c} [pointed|shouted|waved]. ^the {oa} {o} was {s3}!
{s3}, something [moved|gleamed|stuck out|caught {his} eye]. {h} [pulled|picked|lifted] it [up|out] <fast>. [It was|\
There was] the {oa} {o}!

[<thank>|]
--
[<joy>|]

[{h} [tied|put|tucked|dropped] the {oa} {o} [into|in] {his} {bag} <fast>, and {c} [held|watched|carried] it [part of|\
half|most of|all] the way home <fast>.|]
^
^

[<night>|]

<lesson>
""",
    ),
    (
        "o lift put tool do",
        """
kite; flew; high in [an oak|a pine|an apple] tree; [long|bent|wooden] rake; [pulled|shook] it down, kite; sailed; on
[a barn|a red|a steep] roof; [tall|thin|strong] ladder; climbed up and [got|freed] it, ball; bounced; behind a
[high|stone|brick] wall; [strong|thick|long] rope; climbed over and [threw|tossed] it back, ball; rolled; in a
[deep|dark|muddy] hole; [fishing|green|round] net; scooped it [out|up], pinwheel; blew; on a [flag|tent] pole; [long|\
iron]
hook; [hooked|caught] it, paper bird; flew; in a [thorn|rose|holly] bush; pair of [thick|leather] gloves; [reached in|\
leaned
over] and got it, paper plane; glided; on a [high|stone|window] ledge; [long|straw] broom; [swept|pushed] it off,
balloon; floated; in the [high|thick|top] branches; [strong|tall] ladder; climbed up and [caught|saved] it, toy boat;
drifted; behind the [sharp|big|wet] rocks; [long|thin] pole; [pushed|steered] it back, hoop; rolled; in a
[wet|grassy|deep] ditch; [bent|forked|long] stick; [fished|pulled] it out, frisbee; sailed; in the [thick|wild|dark]
ivy; [wooden|long] oar; [knocked|poked] it loose, streamer; blew; on a [lamp|sign|fence] post; [tall|folding] stool;
[got|stood] up and freed it
""",
        """
[asking|calling|looking] for [a {ha} {helper}|help|{c}] is [wise|good|smart|brave|no shame]
[two|three|four|many] [hands|heads|friends] and [{c}|a {ha} {helper}] [reach|do|can do] more than one
[the right|a good|a simple] [tool|plan|idea] from [{c}|a {ha} {helper}] is better than [jumping|shouting|kicking|\
pulling] <sim>
[a {ha} {helper}|{c}|a <helptrait> neighbor] can [help|save the day|find a way] when a {oa} {o} is [stuck|lost|gone|\
too far]
no [[wall|roof|tree|pole] is too [high|steep|tall]|[hole|ditch|bush] is too [deep|dark|wide]] for {c} [and|with] a \
{ha} {helper}
[thinking|planning|asking {c}|asking a {ha} {helper}] comes first, and [jumping|pulling|shouting] comes [later|second|\
last]
""",
        """
<open>

[<about>|||]

<friend>
--
<day>

{h} had a [special|dear|favorite|beloved] {oa} {o} [from {his} {fam}|that cost <num> coins|with a <color> [star|\
stripe|moon|heart|dot] on it], and {c} [loved|liked] it too.
{c} [wanted|asked|begged] to see the {oa} {o}, so {h} [took|got] it [out|from {his} {bag}] <fast>. <they> played \
<until>.
{h} and {c} [tossed|threw|chased|carried] the {oa} {o} [around|back and forth|up and down] <until>.

<soon>, the {oa} {o} {lift} [past|away from] {c} <sim> and [landed|stopped] {put}. "[Quick|Hurry|After it|Oh no], \
{c}!" {h} [cried|shouted|yelled] <how>.
"[Look out|Oh no|Watch out|Catch it], {h}!" [cried|shouted|yelled] {c}. The {oa} {o} {lift} past {h} and {c} <sim> \
and [landed|came down] {put}.
the {oa} {o} {lift} [off|away] <sim>, and {h} could not [grab|reach|stop|catch] it. "^{c}, it is {put}!" {h} [cried|\
shouted|yelled] <how>.
--
{h} [jumped|stretched|reached|tried] <num> times <sim>. {c} [lifted|pushed|held] {h} <fast>, but [nothing|none of it] \
[helped|worked].
{c} [threw|tossed|waved] <trifle>, and {h} [jumped|called|whistled] <sim>, but the {o} [did not move|only shook].
^
^
[first|at first] {h} [shouted at|pulled at|whistled to] it. [Next|Then] {c} [tried|used] <trifle>. [Nothing|None of \
it] [worked|helped], and {h} <felt> <low>.
^
^

[<sad>||]

[<cheer>|||]
--
<meet>

"^{h}, [I have|here is|I own|take] a {tool}," the {ha} {helper} <said> <how>. "[Hold|Carry|Mind|Watch] my [basket|bag|\
coat|hat|lunch|dog|boots|cart], {c}, and [we|I] [can|will] try it."
the {ha} {helper} [looked|gazed|peered] at the {oa} {o}, [turned|nodded|bowed|waved] to {h}, and <said> <how>, "^{c}, \
[bring|find|fetch] my {tool} <where>."
the {ha} {helper} [went|hurried] past <past> to [fetch|find|get] a {tool}. {h} [waited|watched] <sim> and {c} [hummed|\
hopped|stood] <where>.

<soon>, the {ha} {helper} {do} <deft>, and {h} [cheered|clapped|jumped] <sim>. "[Not one|No] [corner|part|side] of it \
is [torn|broken|hurt], {h}," {c} <said> <how>.
{h} [held|steadied] the {tool} <fast> [while|as] {c} [counted to <num>|gave directions|kept watch|called out]. The \
{ha} {helper} {do}.
{h} [stood back|held on to {c}|waited] <where>, and the {ha} {helper} {do} <deft>. [Down|Back|Home] to {h} came the \
{oa} {o}, [a bit|a little] [dusty|dirty|wet] but [safe|whole|fine].

[<thank>|]
--
[<joy>|<night>|||]

<lesson>
""",
    ),
    (
        "thing verb done need helper",
        """
apple pie; bake; baked; apples; farmer, honey cake; bake; baked; honey; beekeeper, nut loaf; bake; baked; flour;
miller, pot of stew; cook; cooked; carrots; gardener, toy boat; build; built; nails; carpenter, birdhouse; build;
built; boards; carpenter, puppet; sew; sewed; cloth; tailor, warm quilt; sew; sewed; thread; weaver, paper lantern;
make; made; glue; teacher, clay bowl; shape; shaped; clay; potter, dragon kite; make; made; string; sailor, berry
tart; bake; baked; butter; baker, rope swing; hang; hung; rope; sailor, welcome sign; paint; painted; paint; painter,
long scarf; knit; knitted; wool; shepherd, cheese pie; bake; baked; milk; goat, tree house; build; built; planks;
carpenter, plum pudding; cook; cooked; sugar; shopkeeper, dog bed; sew; sewed; feathers; goose, wooden sled; build;
built; screws; miller
""",
        """
[work|a hard job|making a {thing}] [feels|is|grows] [lighter|sweeter|shorter] with {c} and a {ha} {helper}
a [fair|good|kind] trade leaves {c} and a {ha} {helper} [happy|smiling|content]
the [best|finest|nicest] {thing} is [made|finished] with {c} and [shared|enjoyed] with <food>
[work|help] for a {ha} {helper} [earns|brings] [{need}|<food>] and [thanks|<food>|a friend like {c}]
[asking|trading|working] <sim> is [better|wiser|nicer] than [giving up|waiting|complaining]
[{c}|a friend like {c}|a {ha} {helper}] is worth more than [{need}|a {thing}|<food>|any pay]
""",
        """
<open>

[<about>|||]

<friend>
--
one {w} {day}, {h} [wanted|decided|planned|promised] to {verb} a {tadj} {thing} with {c} {why}. {c} [came|offered|sat \
down|hurried] to help {h} <fast>.
all [week|month|day], {h} had [hoped|wanted|wished|planned] to {verb} a {tadj} {thing} with {c} {why}. {c} [liked|\
loved] {h}'s [plan|idea] and <smile> <fast>.
"^{c}, I [want|hope|promised|need] to {verb} a {tadj} {thing}," {h} <said> <how>. "It is {why}." {c} [agreed|said yes|\
came along] <fast>.
{sky} that {day}. "^{why}, {c}, [let's|I want to|we should] {verb} a {tadj} {thing}," {h} <said> <how>, and {c} \
<smile> <fast>.

{h} [opened|searched|checked] [every|each] [drawer|box|jar|shelf|bag] and found <trifle>, <color> [paper|tape|chalk|\
wax|beads], and [a|one] <thing>, but {c} [saw|found|had] no {need} <where>.
{h} [put on|tied on|found] a <color> [apron|coat|shirt] and {c} [cleared|wiped|set|washed] the [table|bench|shelf] \
<fast>. "^{h}, [there is|we have] no {need}!" {c} [cried|said] <how>.
"we [need|must have|can't start without] {need}," said {c} <how>, [and|but] the [shelf|box|jar|basket|drawer] [was|\
stood] [empty|bare]. {h} saw only <trifle>.
--
[<sad>||]

"[Who has|Who sells|Where can we find|Who could lend us] {need}?" asked {h} <how>. "The {ha} {helper} [has|keeps|\
owns] [plenty|a lot|some]," [said|answered] {c} <how>.
{c} had an idea <where>. "^{h}, [let's|we could|we can] [visit|ask|go and see] the {ha} {helper}," {c} <said> <how>. \
So <they> <go> past <past>.
{h} and {c} <go> past <past> and <past> [to find|until {c} met] the {ha} {helper}, who was [resting|working|singing] \
<where>.

{h} [saw|found] the {ha} {helper} with {hold} <where>. "You may have {need}, {h}, [if|when] {c} and you [work|help] \
<where> [today|first|for an hour]."
"[You want|You need|You came for] {need}, {h}?" asked the {ha} {helper} <how>. "[Work|Help me|Do my chores] <where>, \
{h}, and [{c} can carry it home|I will give {c} <num> bags|I will pay {c} with it]."
"I [have|keep|own] {need}," said the {ha} {helper} <how>. "But, {h}, my [back|foot|arm|knee] [hurts|is sore|aches]. \
[Can|Will|Could] {c} and you [help|work] <where>?"

so {h} <chore>, and {c} <chore>. [The {helper}|The {ha} {helper}] [paid|gave|handed] them {need} in a [small|neat|\
clean|big|heavy] <color> [bag|box|jar].
{c} <chore> [while|as] {h} <chore>. "^{h}, [that is|this is] [enough|well done|good work]. [Take|Here is|Have] \
{need}," the {ha} {helper} <said> <how>.
"[Agreed|Deal|We will|Happy to]!" said {h} <how>. ^{he} <chore>. {c} <chore> <fast>, and the {helper} [was|looked] \
<glad>.
--
[back home|at the {home}|in the kitchen|at the table], {h} [measured|cut|sorted|counted] <fast> and {c} [mixed|tied|\
pressed|turned] <sim>. <soon>, <they> had {done} the {tadj} {thing}.
{h} worked [all {day}|until dark|with care] [while|as] {c} [sang|cleaned up|held things|told jokes] <where>. ^their \
{tadj} {thing} was <very> <nice>.
{h} [needed|took|used] <num> tries and {c} [made|left] a <color> mess <where>, but {h} and {c} {done} a {tadj} \
{thing} <fast>.

[{his} {fam} [saw|touched|looked at] the {thing} and <smile> <fast>. "[Who made this|Is this yours|Did you do this], \
{h}?" ^{h} [nodded|pointed at {c} too|<smile>].|]
[people|neighbors|friends|everyone] [came from|gathered near] <past> to see {h} and the {tadj} {thing}. The {helper} \
[clapped|cheered] <where>, and {c} <smile> <fast>.
"^{h}, [that|this] is the [finest|best|biggest|prettiest] {tadj} {thing} near <past>," said the {ha} {helper} <how>. \
{c} [bowed|blushed|<smile>].
^
^

[<joy>|<night>|||]

<lesson>
""",
    ),
    (
        "fear task past",
        """
deep water; swim to the [dock|raft]; swam there, the dark; walk through the [tunnel|dark barn]; walked through, high
places; climb [the tower|to the tree house]; climbed up, thunder; sleep in the [tent|hay loft]; slept there, big dogs;
walk past the [guard dog|gray dog]; walked past, shaky bridges; cross the [rope bridge|old bridge]; crossed over,
spiders; clean out the [attic|shed]; cleaned it all out, big crowds; sing on the [stage|balcony]; sang <num> songs,
angry bees; pass the [bee hives|buzzing tree]; passed by, tall waves; ride in the [row boat|canoe]; rode in it, fast
rides; go down the [tall slide|long slide]; went all the way down, dark cellars; fetch a jar from the [cellar|vault];
fetched <num> jars, strangers; talk to the [sailor|shopkeeper]; asked the way, loud noises; beat the [great drum|brass
gong]; beat it <num> times, masks; go to the [costume party|puppet show]; went inside
""",
        """
[courage|a brave heart] [grows|comes] from {c} and [small|slow|brave|quiet|shaky] steps [past|toward] [{fear}|a big \
fear]
a fear of {fear} [gets|grows|becomes] [smaller|weaker|lighter] with {c} and <food>
[small|little|slow] steps with {c} [beat|calm|tame] [a deep|a great|a loud] fear of {fear}
[shaking|trembling|hiding] <sim> is [all right|fine|no shame] with {c} [near|close by|around]
[a word|a smile|a hug|help|a song|a wink] from {c} [beats|calms|tames] [a|any|every] [bad|old|loud|deep|great] fear \
of {fear}
[trying|a brave try|a first step] with {c} [beats|is better than] [hiding|running|shaking|crying] <sim>
""",
        """
<open>

[<about>|||]

<friend>

{h} [was afraid of|feared|did not like|ran away from] {fear}. {c} [once|often|sometimes] [saw|heard] {h} [shake|cry|\
tremble|sob|hide] <sim> <where>.
{c} knew [one|a] [secret|thing] about {h}. ^{fear} [scared|frightened|worried] {h} <sim>, even [on <weekday>|at home|\
in bed|in dreams].
[running|counting|jumping|dancing|skating|juggling|hopping|whistling] and [reading|drawing|spelling|cooking|sewing|\
painting|knitting|baking] were easy for {h} and {c}, but {fear} made {h} [hide|tremble|cry|freeze] <sim> [under a \
blanket|behind {c}|in a corner].
--
<plain>

"[Come on|Look|Come here|Wake up]!" {c} <said> <how>. "[Let's|We can|I want to] {task}, {h}, and [eat|share|have] \
<food> [with your {fam}|<where>]."
{c} [wanted|hoped|was eager] to {task}. "[Do|Please|Just] come, {h}," {c} <said> <how>, and [held out|offered] <food>.
"^{c} can {task}, {h}," said <num> [friends|neighbors|cousins] <how>. {c} [pulled|tugged] at {his} {clothes}, but {h} \
[stood still|stepped back] <sim>.

"I [can't|can not|won't], {c}," {h} <said> <how>. "[Ever since <weekday>|At night|Since last year|Even now], I [shake|\
run|hide|cry|tremble] <sim> [because of|when I think of] {fear}."
{h} [shook {his} head|took a step back|went pale] <sim>. "[Not me|Not today|Maybe tomorrow|You go first], {c}," {he} \
<said> <how>.
{his} [heart|stomach] [jumped|pounded|turned over] <sim>. "[What if|Suppose] I [fall|fail|cry|get hurt], {c}?" {h} \
<asked> <how>.
^
^
^
^
--
[<cheer>|||]

"[When I am|If I feel|Whenever I am] [afraid|scared|<low>]," {c} <said> <how>, "^I [count to <num>|sing a [song|tune]|\
think of <food>|hold a <color> <thing>|take <num> deep breaths]."
"[Let's try|Try|Here is] a trick, {h}," said {c} <how>. "[Think of|Look for|Name] <num> <color> <thing>s, {h}, and [I|\
we] will [count|walk|go] [slowly|together|step by step]."
a {ha} {helper} [sat|was working] <where> with {hold}. "[I, too,|Once I|Even I] feared {fear}, {h}," the {ha} \
{helper} <said> <how>. "[Breathe|Walk|Go] slowly, [hold on to|look at|stay near] {c}, and [count to <num>|hum|smile]."

{h} <deep> and [squeezed|took|held] a <color> <thing> <where>. <soon>, {h} [took|made] [one|the first|a tiny] step \
[toward|past] {c}.
{h} <deep> <where>. "[I will try|I can do it|I want to try|Here I go], {c}," {h} <said> <how>, and [began|started|\
went] <fast>.
"[Stay|Walk|Keep] [close to me|near me|by my side|next to me], {c}," {h} <said> <how>. ^{he} <deep> <where> and \
[moved|went|stepped] past {c} and <trifle>.
--
[step by step|little by little|bit by bit|slowly but surely], {h} {past} <fast>! {c} [clapped|shouted|whistled|\
cheered] <num> times, and {his} [fear|worry] [melted|shrank|faded].
it was [hard|scary|strange] [at first|for a minute|in the beginning|to start with], [but|yet] {h} {past} <fast> as \
{c} [watched|waited|hummed]. ^{he} [opened {his} eyes|looked at {c}|looked around] and <smile> <fast>.
with {c} [singing|humming|counting|waiting] <where>, {h} {past} <fast>. {his} [legs|{hand}s|knees] [shook|were cold], \
[but|yet] {h} [kept going|went on].

[<joy>|]

{h} did it [again|once more] <fast>, and {c} [counted|hummed|waited] <where>. [The next time|Each try] [felt|was|\
seemed] [easier|less scary|better], and {h} <smile> at {c} <fast>.
^
^
"[You were|How|That was] [so|very|really] brave, {h}!" {c} <said> <how>. {h} [blushed|<smile>] and [offered|gave] \
{chim} <gift>.
"[Again|Once more|One more time], {c}!" {h} [cried|said|shouted], and {c} [laughed|<smile>] <fast>. <they> [stayed|\
went on] <until>.
^
^

[<night>|]

<lesson>
""",
    ),
    (
        "o break mend",
        """
drum; split; patched the skin, kite; tore; glued the paper, wagon; lost a wheel; nailed on the wheel, doll; lost an
arm; sewed on the arm, puzzle; broke apart; sorted the pieces, toy train; cracked; glued the crack, ball; went flat;
pumped it up, bucket; lost its handle; bent a new handle, picture book; ripped; taped the pages, hobby horse; came
apart; tied it with string, toy bear; burst; stuffed it with wool, sled; cracked; nailed on a board, tea set; chipped;
painted the chip, jump rope; ripped; made a strong knot, guitar; lost a string; put on a new string, trumpet; got
bent; bent it straight, pillow; burst; put the feathers back, mask; tore; pasted the sides, umbrella; broke; fixed the
handle, basket; fell apart; wove in new reeds
""",
        """
a {o} is [twice|much|far|always] [better|sweeter|finer] when [two|friends|{c} and friends] [share|take turns]
[one|a] [good|dear|true|loyal] friend like {c} is worth [more than|far more than|ten times] [a {oa} {o}|a box of \
<color> <thing>s|<food>]
saying sorry to {c} [mends|fixes|heals] more than [glue|thread|nails|shouting|<food>]
[pulling|grabbing|fighting] <sim> [breaks|spoils|ruins] [toys|games|a {o}|a friendship]
if [you|children|friends] [gladly|freely|often] [share|lend] [<food>|a {oa} {o}|a <color> <thing>], [{c}|a friend \
like {c}] will [share|smile|come back|stay]
[nobody|no one|neither side] wins a [loud|long|silly|bitter] [fight|quarrel] [over|about] [a {oa} {o}|<food>|{game}]
""",
        """
<open>

[<about>|||]

<friend>
--
<day>

there [they saw|they found|stood|was] a {oa} {o} {s1}. "[Mine|I saw it first|It is mine|I want it]!" [cried|shouted] \
{h}. "[No|Wait], I [do|did|want it]!" {c} <said> <how>.
a {ha} {helper} with {hold} let {h} and {c} [use|borrow|play with|try] a {oa} {o}. {h} [wanted|asked] to go first, \
[and so did|but so did] {c}.
{c} had [brought|carried along|come with] a {oa} {o}, and {h} [badly|really] wanted [a turn|to try it|to hold it]. \
"[Not yet|Wait|Not now], {h}," {c} <said> <how>.

{h} [pulled|tugged|grabbed] [one|this] [side|end], {c} [pulled|tugged|yanked] the other <sim>, and [crack|snap|bang|\
crash]! ^the {oa} {o} {break} <where>.
"[Give it|Let go|Hand it over|Stop], {c}!" {h} [said|yelled|cried]. "[No|Never|You let go]!" {c} [said|yelled|cried] \
<sim>. [Then|So|Suddenly] the {oa} {o} {break} <where>.
{h} and {c} [pushed|argued|fought|shouted] <until>, and {h} [held on|hung on|kept pulling] <sim>. <soon>, the {oa} \
{o} {break}.
--
[<sad>||]

{h} [sat|went to sit] {s2}, and {c} [sat|went to sit] {s3}. {h} did not [speak|look up|smile|say a word] <until>.
^
^
"[You did it|It was you|This is your fault|You pulled too hard], {h}," {c} <said> <how>. {h} [turned away|walked off|\
frowned] <sim> and <felt> <low>.
{c} [hid|cried|frowned] {s2} <sim>. {h} [looked at|picked up|held] the {oa} {o} and [thought|began to think] [about|\
of] {c}.
^
^

[without {c}|alone|all alone], [no game was fun|the {day} felt long|even {game} was dull] for {h} <where>. <soon>, \
{he} [got up|stood up] <sim> and <go> to {c}.
{h} <deep> <where>. Was {c} worth less than a {o}? <soon>, {h} [gave|offered] {c} <food> <fast>.
{his} [heart|throat] [hurt|ached]. {h} [broke|cut|split] some <food> in two <fast> and [took|carried|brought] {c} \
[half|one piece|the bigger half] <where>.
^
^

"[I am|I'm] [sorry|so sorry|very sorry]," {h} <said> <how>. "I [was|acted] [selfish|mean|unfair] <sim>, {c}. [Can|\
Will] you [forgive|excuse] me?"
"[Please forgive me|Forgive me|I was wrong], {c}," {h} <said> <how>. "[Here is|Please take] [my|this] <color> \
<thing>, and [share|keep|enjoy] the {oa} {o}."
"I [pulled|grabbed|shouted|acted] <sim>," {h} <said> <how>. "^{c}, [can we|could we|may we] be friends and [share|eat|\
have] <food>?"
--
"[I am sorry too|So am I|Me too|It was my fault too], {h}," {c} <said> <how>. [Soon|Then] <they> [took|carried] the \
{oa} {o} to the {ha} {helper}.
{c} [wiped {chis} eyes|<smile>|nodded] <sim>. "^{h}, [let's|we can|we should] [mend|fix|repair] it with the {ha} \
{helper}," {c} <said> <how>.
{c} [forgave|hugged] {h} [at once|right away|with a laugh]. The {ha} {helper} [came over|walked up] to {h} with \
{hold} and [offered|wanted] to help {c} <fast>.

[together|with <num> tools|with a little luck], {h} and the {ha} {helper} {mend} <deft>, [while|as] {c} [helped|\
watched|swept up|hummed] <where>.
the {ha} {helper} [showed|taught] them how, and [{h} and {c}|{c} and {h}] {mend} <deft>. "[It looks|It is] <nice> \
[again|now], {c}!" {h} <said> <how>.
{c} {mend} <deft> [and|while] {h} [held|steadied|cleaned] the {oa} {o}. "[Well done|Good work|Good job], {c}," the \
{ha} {helper} <said> <how>.

[[after that|from then on|now], {h} had [it|a turn] for <num> minutes, and {c} had [it|a turn] for <num> minutes[ too|\
].|]
^
{h} and {c} [made|agreed on|wrote] a rule: {h} [first|before lunch|on [Monday|Tuesday|Wednesday]], {c} [next|after \
lunch|on [Thursday|Friday|Saturday]], and [both|the two] [together|side by side] on Sunday [morning|afternoon|night].
{c} [went|played] first, {h} [went|played] second, and [the {helper}|a <helptrait> <helpword>] [kept time|counted|\
clapped] <where>.
^
^

[<joy>|<night>|||]

<lesson>
""",
    ),
    (
        "baby hurt care end",
        """
baby bird; had a [hurt|sore|bent] wing; [wrapped|tied] the wing in [soft|clean] cloth; flew up to its
[nest|tree|flock], kitten; was [wet|muddy] and [cold|weak]; [dried|rubbed] it with a [towel|rag]; ran back to its
[mother|barn|basket], turtle; lay [helpless|stuck] on its back; [turned|rolled] it over; crawled into the
[water|reeds|mud], duckling; had lost its [family|mother]; carried it to the [nest|water]; swam off with the
[ducks|others], puppy; had a [thorn|splinter|tick] in its paw; [pulled|picked] it out; ran home on [strong|quick]
legs, hedgehog; was stuck in a [net|fence|pipe]; [cut|opened] a hole for it; rolled off into the
[leaves|hedge|bushes], butterfly; had [wet|cold|sticky] wings; [set|put] it in the [sun|light]; fluttered up to the
[sky|flowers], fawn; was caught in [vines|a fence|wire]; [bent|pulled] them aside; leaped back to its [mother|herd],
bat; was lost in the [daylight|bright light]; made a dark [box|bed] for it; flew off at [dusk|night], lamb; had fallen
in a [ditch|pit|hole]; [lifted|pulled] it out; trotted back to the [flock|barn], mouse; was shut in a
[jar|box|drawer]; opened the [lid|top]; dashed into its [hole|tunnel], foal; was [weak|hot|tired] and thirsty; gave it
[cool water|wet grass]; galloped to the [herd|stable], owlet; had [dropped|tumbled] from its nest; made a bed of
[moss|leaves]; hopped back into its [nest|tree], crab; was tied up in [weeds|string|a net]; untied the [knots|loops];
walked sideways into the [waves|sea|sand]
""",
        """
[kindness|care|a kind act] from [{c}|a friend like {c}|a {ha} {helper}] [helps|cheers|can save] [any|a lost|a scared|\
a small] {baby}
[small|little|young] [friends|hands|hearts] can [do|give|bring] [great|big|real] [help|comfort|joy]
a [soft voice|calm heart|gentle {hand}] [wins|earns] [trust|a friend like {c}|a {baby}] [best|fastest|for good]
[friends like {c}|two friends] who [help|care for|feed] a {bsize} {baby} [feel|grow|stay] [rich|kind|strong] inside
[every|each] {bsize} {bhue} {baby} [needs|wants|loves] [a friend like {c}|a {ha} {helper}|a kind {hand}]
[being kind|caring|helping] is [better|nicer|finer] than [<food>|winning|a {ccap}|gold]
""",
        """
<open>

[<about>|||]

<friend>
--
<day>

{s1}, {h} [heard|noticed] a [thin|tiny|soft|sad] [cry|sound|squeak] <sim>. "[See|Look], {c}, a {bsize} {bhue} \
{baby}!" {h} <said> <how>. [It|The {bhue} {baby}] {hurt}, and {c} [gasped|shook|frowned|cried|stared|froze] <sim>.
"[Listen|Hush|Wait|Stop], {h}!" {c} <said> <how>. "[Something|Somebody] is [hiding|crying] {s1}." ^{h} [saw|spotted|\
found] a {bsize} {bhue} {baby} <where>. It {hurt}, {c} [saw|noticed], and {h} <felt> <low>.
{c} [almost|nearly] [stepped on|tripped over|walked past] a {bsize} {bhue} {baby} {s1}. "[Careful|Stop], {c}!" [said|\
cried] {h}. [It|The {bhue} {baby}] {hurt}, and {c} told {h} <softly> to [be quiet|sit down|stay back|move slowly|\
stand still|keep calm|wait].

{h} [bent|leaned|knelt] down <fast>. "[Poor thing|Poor little one|Don't be afraid], {bsize} {baby}," {he} <said> \
<how>. "[Eat|Taste|Try|Take] <crumbs>, and {c} [will|can] [sing|hum|wait|watch] [for you|near you|<where>]."
{h} and {c} <felt> <low>. "[We can't|We must not|Let's not] leave [it|the {bhue} {baby}] [here|alone|like this], \
{c}," {he} <said> <how>.
^
^
{h} [saw|met] its [big|round|dark|scared] eyes and <felt> <low>. {c} [wanted|longed] to [help|comfort|feed|warm|hold] \
the {bhue} {baby}.
--
"{c}, [I don't|do you|we don't] know what to do," {h} <said> <how>. "[Let's ask|We need|Let's find] the {helper}." \
{c} [ran|went|raced|hurried|dashed] off <fast>.
{h} [took|used] {his} {clothes} to keep the {bhue} {baby} [warm|safe|calm], and {c} <go> past <past> for [help|the \
{helper}].
^
^
{h} [saw|felt] that it [shook|feared them] <sim>. {h} [sang|hummed|whispered] <how> and {c} [stayed quiet|sat still] \
<where>.
^
^

a {ha} {helper} [came|hurried over|walked up] with {hold}. "[Be gentle|Move slowly|No loud sounds|Stay calm], {h}," \
said the {ha} {helper} <how>.
"^{h}, [hold|touch|talk to] it <how>," said a {ha} {helper}, who [came|walked] past {c} with {hold}. "[It|The {baby}] \
[is|looks] [scared|shy|tired|lost], so {c} and you must be [calm|kind|slow|patient]."
"[You and {c} have|I see] [kind|good|brave|warm] hearts," a {ha} {helper} <where> <said> <how>. "[Sit|Stay|Kneel] by \
{c}, {h}, and [watch|copy|help] me."

so {h} {care} <deft>, and {c} [brought|fetched|found] [clean water|fresh leaves|soft moss|warm milk|dry straw] in a \
<color> [cup|bowl|dish|pan].
{c} [held|kept] it [still|calm] <where> [while|as] {h} {care} <deft>. Not even {c} [spoke|moved|made a sound] <until>.
{c} [watched|hummed|waited] <where> [while|as] {h} {care} <deft>. "[There|Good|That's it|All done], {h}," {c} <said> \
<how>.
--
for <num> [days|hours|minutes], {h} and {c} [stayed|waited|kept watch] <where>, and the {bhue} {baby} [ate|nibbled|\
tasted] <crumbs> <fast>.
^
the {bhue} {baby} [rested|slept|lay still] {s2} for <num> [hours|minutes]. {c} [counted|hummed|yawned] <where>, and \
{h} [stayed awake|told it stories|kept it warm].
[little by little|bit by bit|slowly], the {bsize} {bhue} {baby} [felt|grew|got] [stronger|braver|better]. {h} [gave|\
fed] it <crumbs> <fast>.
^
^

<soon>, the {bhue} {baby} [looked at|turned to|nudged] {h}, [looked at|blinked at|sniffed] {c}, and {end} <fast>.
"[Goodbye|Farewell|Go on|Be safe], {bsize} {baby}!" {h} <said> <how>. {c} [waved|whistled|stood up] <fast>, and [it|\
the {bhue} {baby}] [winked at|nudged|looked at] {h} <quickly> and {end}.
<soon>, the {bhue} {baby} [winked at|bowed to|nudged] {h} <quickly> and {end}. {c} waved [goodbye|{chis} {ccap}] \
<fast>, and {h} [blinked|smiled|sniffed] <where>.

[<joy>|<night>|||]

<lesson>
""",
    ),
)

# The grammar machine.

STARTS = re.compile(r"(\^\"?|[.!?] \"?|\.\" \"?|(?<![^ ])\")([a-z])")  # a quote after a space opens, else it closes
AN = re.compile(r"\b([Aa]) (?=[aeiou])")
Item = TypeVar("Item")
Node: TypeAlias = "str | tuple[Node, ...] | list[Node]"
Plot: TypeAlias = tuple[list[str], list[list[Node]], list[Node], list[list[list[Node]]]]  # as PLOTS, parsed
NODES: dict[str, list[Node]] = {}


def parse(text: str) -> Node:
    """The grammar node of a phrase: a string, a tuple (parts in sequence) or a list (alternatives)."""
    stack: list[list[list[Node]]] = [[[]]]  # the open choices, each a list of sequences
    for token in re.split(r"([\[|\]]|<\w+>)", text):
        if token == "[":
            stack.append([[]])
        elif token == "|":
            stack[-1].append([])
        elif token == "]":
            options = [tidy(sequence) for sequence in stack.pop()]
            stack[-1][-1].append(options)
        elif token.startswith("<"):
            stack[-1][-1].append(NODES.setdefault(token[1:-1], []))
        elif token:
            stack[-1][-1].append(token)
    (sequences,) = stack
    return tidy(sequences[0]) if len(sequences) == 1 else [tidy(sequence) for sequence in sequences]


def tidy(sequence: list[Node]) -> Node:
    """A sequence of nodes as one node."""
    return sequence[0] if len(sequence) == 1 else tuple(sequence)


def choose(items: Sequence[Item], rng: random.Random) -> Item:
    """One of the items, drawn with rng.random() because its stream is the same in every Python version."""
    return items[int(rng.random() * len(items))]


def draw(items: Iterable[Item], count: int, rng: random.Random) -> list[Item]:
    """``count`` different items, in random order."""
    rest = list(items)
    return [rest.pop(int(rng.random() * len(rest))) for _ in range(count)]


def grow(node: Node, rng: random.Random) -> str:
    """One random expansion of a node."""
    words: list[str] = []
    spread(node, rng.random, words.append)
    return "".join(words)


def spread(node: Node, draw_number: Callable[[], float], emit: Callable[[str], None]) -> None:
    """Emit the strings of one random expansion of a node, in order."""
    while type(node) is list:
        node = node[int(draw_number() * len(node))]
    if type(node) is str:
        emit(node)
        return
    for part in node:
        if type(part) is str:
            emit(part)
        else:
            spread(part, draw_number, emit)


def rows(table: str, separator: str = "\n") -> list[list[Node]]:
    """A table's rows, each a list of parsed columns."""
    return [[parse(cell.strip()) for cell in row.split(";")] for row in table.strip().split(separator)]


def fill_banks() -> None:
    """Put the alternatives of every bank into NODES."""
    bank: list[Node] = []
    for line in filter(None, BANKS.split("\n")):
        if line.startswith(" "):
            bank.append(parse(line.strip()))
            continue
        name, _, words = line.partition(":")
        bank = NODES.setdefault(name, [])
        if words:
            bank.extend(parse(words.strip() + "|")[:-1])  # the added bar makes a list of a single alternative too


fill_banks()
FACT_NODES = {key: parse(text) for key, text in FACTS.items()}
KINDS = [{key: parse(text) for key, text in table.items()} for table in (CHILD, ANIMAL)]
PLACE_ROWS = [
    (to, at, spots.split(","), [parse(sight) for sight in sights.split(",")])
    for to, at, spots, sights in (row.split(";") for row in PLACES.strip().split("\n"))
]
WEATHER_ROWS = rows(WEATHER)
PLOT_NODES = [
    (
        columns.split(),
        rows(table, ","),
        [parse(line) for line in moral.strip().split("\n")],
        [
            [[parse(line) for line in beat.strip().split("\n")] for beat in paragraph.split("\n\n")]
            for paragraph in beats.split("--")
        ],
    )
    for columns, table, moral, beats in PLOTS
]


def make_world(plot: Plot, rng: random.Random) -> dict[str, str]:
    """The facts of one story: every slot's text, fixed before the first sentence is written."""
    columns, table, moral, _ = plot
    world = {}
    animal = rng.random() < 0.35
    gender, other = draw(("girl", "boy"), 2, rng)
    if rng.random() < 0.3:
        other = "it"  # a pet or a small wild friend; two people are never of one gender, so no pronoun is ambiguous
    for prefix, who in (("", gender), ("c", other)):
        for key, word in zip(("he", "his", "him"), PRONOUNS[who], strict=True):
            world[prefix + key] = word
    names = {"girl": GIRLS, "boy": BOYS, "it": PETS}
    world |= {"h": choose(names[gender], rng), "c": choose(names[other], rng), "gender": gender, "cgender": other}
    world["t"], world["t2"], trait = (grow(node, rng) for node in draw(NODES["trait"], 3, rng))
    for key, habit in zip(("likes", "likes2", "clikes", "clikes2"), draw(NODES["habit"], 4, rng), strict=True):
        world[key] = grow(habit, rng)
    kind, ckind = draw(ANIMALS, 2, rng) if animal else (gender, other)
    if other == "it":
        ckind = choose([pet for pet in PET_KINDS if pet != kind], rng)
    kin = [] if animal or other == "it" else ["cousin", "brother" if other == "boy" else "sister"]
    world |= {"kind": kind, "ckind": ckind, "cwho": f"a {trait} {ckind}"}
    world["rel"] = choose(["best friend", "dear friend", "good friend", "friend", *kin], rng)
    to, at, spots, sights = choose(PLACE_ROWS, rng)
    world |= {"to": to.strip(), "at": at.strip(), "sight": grow(sights, rng).strip()}
    for number, spot in enumerate(draw(spots, 4, rng), 1):
        world[f"s{number}"] = spot.strip()
    weather, *skies = choose(WEATHER_ROWS, rng)
    world |= {"w": grow(weather, rng), "sky": grow(skies, rng)}
    facts = FACT_NODES | KINDS[animal] | dict(zip(columns, choose(table, rng), strict=True)) | {"moral": moral}
    for key, node in facts.items():
        world[key] = grow(node, rng).format_map(world)
    return world


def tell(seed: int, index: int) -> tuple[dict[str, str], str]:
    """Story `index` of a seed: its world, and its text."""
    digest = hashlib.sha256(f"{seed}:{index}".encode()).digest()
    rng = random.Random(int.from_bytes(digest[:16], "big"))
    while True:
        plot = choose(PLOT_NODES, rng)
        world = make_world(plot, rng)
        text = "\n\n".join(" ".join("^" + grow(beat, rng) for beat in paragraph) for paragraph in plot[3])
        text = text.format_map(world)
        text = STARTS.sub(lambda found: found[1].strip("^") + found[2].upper(), text)
        paragraphs = filter(None, (" ".join(part.split()) for part in text.replace("^", "").split("\n\n")))
        text = AN.sub(r"\1n ", "\n\n".join(paragraphs).replace(" ,", ","))
        if 90 <= len(text.split()) <= 260:
            return world, text


def story(seed: int, index: int) -> str:
    """The text of story `index` of a seed: several paragraphs of plain English, 90 to 260 words."""
    return tell(seed, index)[1]


# The data source itself (registered part) follows.


@register("data")
@reads_token_files
class SyntheticStories:
    """Built-in stories, which need no download. Stories 0 to ``stories`` - 1 are for training, the next
    ``val_stories`` for validation. Which stories there are depends on ``corpus_seed``, never on the run's seed."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        seq_len: int,
        seed: int,
        stories: Annotated[int, Gt(0)] = 20_000,
        val_stories: Annotated[int, Gt(0)] = 500,
        corpus_seed: Annotated[int, Ge(0)] = 0,
    ):
        self.ranges = {"train": range(stories), "val": range(stories, stories + val_stories)}
        self.corpus_seed = corpus_seed
        self.files = TokenFiles(tokenizer, seq_len, seed, self._documents, self._source)

    def _source(self) -> dict[str, Any]:
        generator = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()  # other tables tell other stories
        sizes = {split: len(indices) for split, indices in self.ranges.items()}
        return {"synthetic": generator, "corpus_seed": self.corpus_seed, **sizes}

    def _documents(self, split: str) -> Iterator[str]:
        return (story(self.corpus_seed, index) for index in self.ranges[split])
