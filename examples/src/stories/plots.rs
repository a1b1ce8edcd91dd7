//! What can happen in the valley: one function a plot, and the parts that plots share.

use super::teller::Teller;
use super::world::{BREAKABLES, CREATURES, FEARS, PLACES, SEEDS, SKILLS, THIEVES, TOYS, WONDERS, WORKS};

/// A plot and its name.
pub(super) type Plot = (&'static str, fn(&mut Teller));

/// All plots, equally likely.
pub(super) const PLOTS: &[Plot] = &[
    ("lost and found", lost),
    ("sharing", sharing),
    ("afraid", afraid),
    ("building", building),
    ("quarrel", quarrel),
    ("gift", gift),
    ("forgotten birthday", birthday),
    ("rescue", rescue),
    ("rain", rain),
    ("learning", learning),
    ("seed", seed),
    ("thief", thief),
    ("broken", broken),
    ("wonder", wonder),
];

/// One story; returns the name of its plot.
pub(super) fn story(t: &mut Teller) -> &'static str {
    let (name, plot) = t.pick(PLOTS);
    opening(t);
    plot(t);
    name
}

/// Who this is about.
fn opening(t: &mut Teller) {
    t.say(&[
        "Once there was {a h.kind} named {h}.",
        "Once there was {a ~sort} {h.kind} named {h} who {~trait}.",
        "In a village by the river lived {a ~sort} {h.kind} named {h}.",
        "In the valley everyone knew {h}, {a h.kind} who {~trait}.",
        "{h} was {a ~sort} {h.kind} who {~trait}.",
        "{a ~sort} {h.kind} named {h} lived {~home}.",
        "This is the story of {h}, {a ~sort} {h.kind} who lived {~home}.",
        "Far away, behind seven hills, lived {a ~sort} {h.kind} named {h}.",
        "There was {a h.kind} named {h} who lived {~home} and {~trait}.",
    ]);
    if t.sometimes(2, 3) {
        t.say(&[
            "{he} shared a house with {g} and {~many} {~pets}.",
            "{his} favourite colour was {~colour}.",
            "{he} liked {liked} and {liked2}.",
            "In {his} pocket {he} always carried {~pocket}.",
            "{he} was not very big, but {his} voice was.",
            "{he} was good at {~good}, but not at {~bad}.",
        ]);
    }
}

/// To a place, and what it is like there.
fn outing(t: &mut Teller) {
    t.frame(PLACES);
    t.say(&[
        "{~when} {he} {~went} to {place}.",
        "{~when}, when all the work was done, {he} {~went} to {place}.",
        "{~when} {he} took the path to {place}.",
        "{~when}, when the {~bird} was singing in the {~tree}, {he} {~went} to {place}.",
        "\"Be back for supper,\" said {g} {~when}, and {h} {~went} to {place}.",
    ]);
    around(t);
}

/// What it is like in the place.
fn around(t: &mut Teller) {
    if t.sometimes(2, 3) {
        t.say(&["{~view}", "{~view} {~sky}", "{~sky}"]);
    }
}

/// The friend comes and asks.
fn friend_asks(t: &mut Teller) {
    t.say(&[
        "Just then {f.the} came by, {~doing}.",
        "After a while {f.the} came along, {~doing}.",
        "Then {he} heard steps. It was {f.the}.",
        "{f.the} was passing by and stopped.",
        "Luckily {f.the} was not far away.",
        "That was when {f.the} turned up, {~doing}.",
        "{f.the} had seen everything and came closer.",
    ]);
    t.say(&[
        "\"What is the matter?\" asked {f}.",
        "\"Why do you look so {~gloomy}?\" asked {f}.",
        "\"Can I help you?\" {f} asked.",
        "\"You look like a rainy day,\" said {f}. \"What happened?\"",
        "\"Oh dear,\" said {f}. \"Tell me everything.\"",
        "\"Where is your smile today?\" asked {f}.",
    ]);
}

/// The last words of a story of two friends.
fn together(t: &mut Teller) {
    t.say(&[
        "From that day on, {h} and {f} were the best of friends.",
        "They walked home side by side, and the sun went down behind the {~far}.",
        "The two of them laughed until the {~lights} came out.",
        "And if nobody has called them home, they are still sitting there.",
        "That evening {h} thought that a good friend is better than {~riches}.",
        "\"See you tomorrow,\" said {f}. \"See you tomorrow,\" said {h}.",
        "Then they lay down in the {~bed} and looked at the {~above}.",
        "{h} was {~glad}, {f} was {~glad}, and the {~bird} sang in the {~tree}.",
        "In the evening they drank {~drink} and were {~glad}.",
    ]);
}

/// The last words of a story at home.
fn good_night(t: &mut Teller) {
    t.say(&[
        "That night {h} slept like a {~sleeper}.",
        "When the {~lights} came out, {he} was still smiling.",
        "Then {h} yawned, and soon {he} was fast asleep.",
        "{he} went to bed and dreamed of {~dream}.",
        "And {g} gave {him} a kiss on the {~spotted}.",
        "It was the best day of the whole {~span}.",
        "In the evening they drank {~drink}, and {g} told a story about {~dream}.",
    ]);
}

fn lost(t: &mut Teller) {
    t.frame(TOYS);
    t.say(&[
        "{his} dearest treasure was {a look} {toy}.",
        "{he} had {a look} {toy} and often {joy}.",
        "For {his} birthday {g} had given {him} {a look} {toy}.",
        "{he} never went anywhere without {his} {look} {toy}.",
        "At the market {he} had once found {a look} {toy}, and {he} loved it dearly.",
    ]);
    outing(t);
    t.say(&[
        "But when {he} wanted to go home, the {toy} was gone.",
        "There {he} noticed that the {toy} was missing.",
        "{he} played and ran and climbed, and then the {toy} was nowhere to be seen.",
        "When the bells rang for supper, {he} could not find the {toy}.",
        "{he} took a little nap, and when {he} woke up, there was no {toy}.",
    ]);
    t.say(&[
        "{he} looked {spot}, but there was only {junk}.",
        "{he} searched {spot} and found {junk}, but no {toy}.",
        "Was it {spot}? No, there was only {junk}.",
        "{he} looked {spot}. Nothing! {^he} looked {spot2}. Nothing but {junk}!",
        "{he} found {junk}, {junk2} and {junk3}, but no {toy}.",
    ]);
    t.say(&[
        "{h} sat down and wanted to cry.",
        "A {~big} tear ran down {his} nose.",
        "{his} heart grew as heavy as {~heavy}.",
        "{h} sighed so loudly that a {~bird} flew away.",
    ]);
    friend_asks(t);
    t.say(&[
        "\"I have lost my {toy},\" said {h} {~sadly}.",
        "\"My {toy} is gone,\" said {h}, \"and I have looked everywhere.\"",
        "{h} told {f} about the {toy}.",
        "\"My {look} {toy}!\" said {h} {~sadly}. \"It is not here any more.\"",
    ]);
    t.say(&[
        "\"Four eyes see more than two,\" {~says} {f}.",
        "\"We will find it together,\" {~says} {f}.",
        "\"Lost things like to be found,\" {~says} {f}.",
        "\"Let us look again, but slowly,\" {~says} {f}.",
        "\"Shut your eyes,\" {~says} {f}. \"Where did you see it last?\"",
    ]);
    t.say(&[
        "And there it was, {spot3}!",
        "\"Look!\" {~cries} {f}. The {toy} was lying {spot3}.",
        "{f} looked {spot3} and began to laugh. There lay the {toy}.",
        "It did not take long. {^spot3} something {look} was peeping out.",
        "They looked {spot3}, and what did they see? The {look} {toy}!",
    ]);
    t.may_say(&[
        "Perhaps a magpie had hidden it there.",
        "{h} had put it there and forgotten all about it.",
        "Nobody ever learned how it had come there.",
    ]);
    t.say(&[
        "\"Thank you!\" {~cries} {h} and hugged {f}.",
        "{h} was so {~glad} that {he} {~danced}.",
        "Then {h} {joy}, and {f} clapped.",
    ]);
    if t.sometimes(1, 3) {
        t.say(&[
            "From then on, {h} kept the {toy} {~safe}.",
            "After that, the {toy} slept {~safe} every night.",
        ]);
    } else {
        together(t);
    }
}

fn sharing(t: &mut Teller) {
    t.say(&[
        "{~when} {g} gave {him} {a food}.",
        "{~when} {g} baked, and {h} got {a food} all for {himself}.",
        "{~when} {he} bought {a food} at the bakery.",
        "{~when} {v} gave {him} {a food} for {his} help.",
    ]);
    t.frame(PLACES);
    t.say(&[
        "{h} took it to {place} to eat it in peace.",
        "With the {food} in a basket {he} {~went} to {place}.",
        "It smelled so good that {he} {~went} to {place} and sat down at once.",
    ]);
    around(t);
    t.say(&[
        "There sat {f.the} with an empty basket.",
        "There {he} met {f.the}, whose tummy was rumbling.",
        "But {he} was not alone. {^f.the} was sitting there and looked {~gloomy}.",
        "{f.the} came by, {~doing}, and stopped.",
    ]);
    t.say(&[
        "\"What a lovely {food},\" said {f} {~sadly}.",
        "\"I have not eaten since {~ago},\" said {f} {~sadly}.",
        "{f} said nothing, but {f.he} looked at the {food} with {~big} eyes.",
        "\"I had only {~little} for breakfast,\" said {f}.",
    ]);
    t.say(&[
        "{h} looked at the {food}. It was not very big.",
        "At first {h} wanted to hide the {food}.",
        "{h} was hungry too, and {he} thought for a while.",
        "{h} counted to {~many}, as {he} always did when {he} had to think.",
    ]);
    t.say(&[
        "Then {he} broke it in two and gave {f} the bigger half.",
        "\"Half for you and half for me,\" said {h} at last.",
        "\"Come and sit with me,\" {he} said. \"There is enough for both of us.\"",
        "\"Do you want some?\" asked {h}. {^f} nodded {~many} times.",
    ]);
    t.say(&[
        "They ate until not a crumb was left.",
        "It tasted better than anything {he} had ever eaten alone.",
        "They ate slowly and told each other stories about {~dream}.",
        "Only a crumb was left, and a {~bird} got it.",
    ]);
    t.say(&[
        "The next day {f} came to {his} door with {a food2}.",
        "\"Now I will show you something,\" said {f}, and {f.he} led {h} to a nest with {~many} {~colour} eggs.",
        "Then {f} gave {h} {gift}.",
        "\"I will never forget this,\" said {f}.",
        "Then {f} sang {him} a song about {~dream}.",
    ]);
    together(t);
}

fn afraid(t: &mut Teller) {
    t.say(&[
        "One night {he} could not sleep.",
        "One night the wind howled around the house.",
        "One dark night {he} woke up.",
        "One evening {he} lay in bed and listened to the rain.",
        "One night {he} dreamed of {~dream} and woke up.",
    ]);
    t.may_say(&[
        "The whole {~house} was asleep, and the moon was behind the clouds.",
        "The clock struck {~many}.",
        "It was as dark as {~dark}.",
    ]);
    t.frame(FEARS);
    t.say(&["{strange}"]);
    t.say(&[
        "{h} pulled the {~cover} over {his} head.",
        "{his} {~shaking} began to shake.",
        "{h} held {his} breath and did not move.",
        "{his} heart beat like a drum.",
        "{h} became as stiff as a {~stiff}.",
    ]);
    t.say(&[
        "\"That must be {guess}!\" {he} thought.",
        "\"It is {guess}!\" {~whispers} {h}.",
        "Was it {guess}?",
        "Only {guess} could do such a thing!",
    ]);
    if t.sometimes(1, 2) {
        t.say(&[
            "{he} called, and {g} came with a candle.",
            "{he} ran to {g} and told {g.him} everything.",
            "Then the door opened, and {g} came in.",
        ]);
        t.say(&[
            "\"Let us go and see,\" said {g}.",
            "\"Take my hand,\" said {g}. \"We will look together.\"",
            "\"Even {guess} is afraid of the light,\" said {g}.",
        ]);
        t.say(&[
            "They went closer, step by step.",
            "{h} counted to {~many}, and they looked.",
            "They held up the light.",
        ]);
    } else {
        t.say(&[
            "But {h} wanted to be brave.",
            "\"I am not afraid,\" {he} told {his} {~cover}, but it was not quite true.",
            "Then {he} thought of {g}, who was never afraid of anything.",
            "\"{a h.kind} is never afraid,\" {he} said to {himself}.",
        ]);
        t.say(&[
            "{he} lit a candle and crept closer, step by step.",
            "{he} put on {his} slippers, took {~weapon} and went to look.",
            "{he} counted to {~many} and jumped out of bed.",
        ]);
    }
    t.say(&["{truth}"]);
    t.say(&[
        "{h} laughed so loudly that {~many} {~pets} woke up.",
        "{he} had to laugh.",
        "What a relief that was!",
        "How silly it looked in the light!",
    ]);
    t.may_say(&["{bye}"]);
    t.say(&[
        "After that {h} was never afraid of the dark again.",
        "From then on {he} always looked first and trembled later.",
        "\"Most monsters are like that,\" said {g} in the morning.",
        "Then {he} went back to bed and slept until noon.",
        "Then {he} went back to bed and dreamed of {~dream}.",
        "In the morning {he} told {f.the} about it, and they laughed together.",
    ]);
}

fn building(t: &mut Teller) {
    t.frame(WORKS);
    t.say(&[
        "{~when} {he} wanted to build {a made}.",
        "{~when} {he} had an idea. \"I will build {a made}!\" {he} said.",
        "{his} greatest wish was {a made}, and so {he} began to build one.",
        "In a book about {~dream} {he} saw {a made}. \"I want one too,\" {he} thought.",
    ]);
    t.say(&[
        "{he} took {stuff} and worked all {~worktime}.",
        "{he} found {stuff} behind the barn.",
        "{g} gave {him} {stuff}, and {v} lent {him} a hammer.",
        "{he} used {stuff} and {~many} nails.",
    ]);
    t.say(&["{fail}"]);
    t.say(&[
        "\"I give up,\" said {h} {~sadly}.",
        "{h} kicked the {~kicked} and was angry.",
        "{h} was so {~gloomy} that {he} could not eat {his} supper.",
        "\"It will never work,\" {h} said {~sadly}.",
    ]);
    friend_asks(t);
    t.say(&[
        "{h} showed {f} the {made}.",
        "\"My {made} is no good,\" said {h}.",
        "\"Look at my {made},\" said {h}. \"It was so much work!\"",
        "\"I have tried it {~many} times,\" said {h}.",
    ]);
    t.say(&[
        "{f} walked around it {~many} times and thought.",
        "\"It is almost right,\" {~says} {f}. \"Let us try once more.\"",
        "\"The first one never works,\" {~says} {f}. \"The second one does.\"",
        "\"I know somebody who can help us,\" {~says} {f} and pointed at {f.himself}.",
    ]);
    t.say(&["Together they {mend}.", "They rolled up their sleeves and {mend}.", "This time they {mend}."]);
    t.say(&["{works}"]);
    t.may_say(&[
        "\"We did it!\" {~cries} {h}.",
        "\"It is the best {made} in the valley,\" said {f}.",
        "{v} came to see it and clapped.",
        "They painted it {~colour} and wrote both their names on it.",
    ]);
    together(t);
}

fn quarrel(t: &mut Teller) {
    t.say(&[
        "{his} best friend was {f.the}.",
        "{he} played with {f.the} every day.",
        "{he} and {f.the} did everything together.",
        "{he} had known {f.the} since they were as small as {~tiny}.",
    ]);
    outing(t);
    t.frame(TOYS);
    t.say(&[
        "{f} came too, and {spot} they found {a look} {toy}.",
        "There {he} and {f} found {a look} {toy}.",
        "{f} was already there, and {spot} they discovered {a look} {toy}.",
    ]);
    t.say(&[
        "\"It is mine!\" {~cries} {h}. \"No, mine!\" {~cries} {f}.",
        "\"I saw it first,\" said {h}. \"But I picked it up,\" said {f}.",
        "Both of them wanted to have it, and nobody wanted to wait.",
        "\"I need it most!\" {~cries} {f}. \"I found it!\" {~cries} {h}.",
    ]);
    t.say(&[
        "They pulled and pulled until they both fell down.",
        "\"Then I will never play with you again!\" {~cries} {f}.",
        "{h} stamped {his} foot, and {f} turned away.",
        "They called each other {name} and {name2}.",
    ]);
    t.say(&[
        "{h} went home with the {toy}, but it was no fun alone.",
        "For {~many} days they did not speak a word.",
        "{h} sat at one end of the village, {f} sat at the other, and both were {~gloomy}.",
    ]);
    t.may_say(&[
        "The soup tasted of nothing, and the day was as long as {~long}.",
        "\"A {toy} can not laugh with you,\" said {g}.",
        "{h} kept thinking of all the things they had done together.",
    ]);
    t.say(&[
        "Then {h} took a deep breath and {~went} to {f}.",
        "In the evening there was a knock at the door. It was {f}.",
        "At last they met halfway, on the bridge.",
        "{~when} they ran into each other at the corner of the lane.",
    ]);
    t.say(&[
        "\"I am sorry,\" said {h}. \"I am sorry too,\" said {f}.",
        "\"I am sorry,\" they both said at the same time, and then they laughed.",
        "\"Please take it,\" said {h}. \"No, you take it,\" said {f}.",
        "{h} brought {a food}, and {f} brought {gift}.",
    ]);
    t.say(&[
        "From then on, {h} had the {toy} one day and {f} the next.",
        "They gave the {toy} to a child who had none.",
        "First {f} {joy}, and then it was {h}'s turn.",
        "They gave the {toy} to {v}, who had lost it.",
    ]);
    together(t);
}

fn gift(t: &mut Teller) {
    t.say(&[
        "The next day was the birthday of {his} friend {f.the}.",
        "{his} friend {f.the} was ill and had to stay in bed.",
        "{his} friend {f.the} was going to have a birthday.",
        "{his} friend {f.the} had moved into a new house.",
    ]);
    t.say(&[
        "\"I want to give {f.him} something special,\" {he} told {g}, \"but I have no money.\"",
        "{h} looked into {his} purse, but there was nothing in it but {junk}.",
        "{h} wanted to bring a present, but {he} did not know what.",
        "{h} thought of a {~colour} hat, but it was much too dear.",
    ]);
    t.say(&[
        "\"The best presents are not bought,\" said {g}.",
        "\"Give something that you have made,\" said {g}.",
        "{h} thought about it until {his} head was warm.",
        "\"What would {f} like best?\" asked {v}.",
    ]);
    t.say(&[
        "So {he} sat down and made {gift}.",
        "{he} worked until midnight, and then {gift} was ready.",
        "{he} went to the window and made {gift} by the light of the moon.",
        "It took {him} {~many} hours to make {gift}.",
    ]);
    t.say(&[
        "It was a little crooked.",
        "It was not perfect.",
        "\"I hope {f.he} likes it,\" said {h}.",
        "It was a little too {~toobig}.",
        "{he} tied it up with a {~colour} ribbon.",
    ]);
    t.say(&[
        "{~next}, {he} knocked at {f}'s door.",
        "{~next}, {he} carried it through the whole village.",
        "{~next}, {he} put it on {f}'s doorstep, rang the bell and hid.",
    ]);
    t.say(&[
        "{f} was silent for a moment. Then {f.he} smiled from ear to ear.",
        "\"For me?\" asked {f}, and {f.his} eyes were shining like {~bright}.",
        "{f} laughed and cried at the same time.",
        "{f} was so {~glad} that {f.he} {~danced}.",
    ]);
    t.say(&[
        "\"Nobody has ever given me anything so lovely,\" said {f}.",
        "\"I will keep it for ever,\" said {f}.",
        "\"You made it yourself?\" asked {f}. {^h} nodded.",
        "\"It is better than {~riches},\" said {f}.",
    ]);
    together(t);
}

fn birthday(t: &mut Teller) {
    t.say(&[
        "One morning {he} woke up and {~thinks}, \"Today is my birthday!\"",
        "The day of {his} birthday had come at last.",
        "{he} had counted the days, and now it was {his} birthday.",
    ]);
    t.say(&[
        "But {g} only said, \"Good morning. Please feed the {~pets}.\"",
        "But there was no cake on the table, and nobody sang.",
        "But at breakfast everyone talked about {~dull}.",
        "But there was only {~little} for breakfast, as always.",
    ]);
    t.say(&[
        "{h} went to see {f.the}, but {f} had no time.",
        "{he} met {f.the} in the lane. \"I must hurry,\" said {f}, and {f.he} ran off.",
        "{he} told {f.the} what day it was. \"Is it?\" said {f}. \"How nice.\"",
        "{f.the} walked past, {~doing}, and said only hello.",
    ]);
    t.say(&[
        "\"They have all forgotten me,\" said {h} {~sadly}.",
        "{h} sat down on the steps and counted {~pets}.",
        "{his} {~lip} began to tremble.",
        "{his} heart was as heavy as {~heavy}.",
    ]);
    t.frame(PLACES);
    t.say(&[
        "All alone {he} wandered to {place}.",
        "In the afternoon {he} walked to {place} to be sad in peace.",
        "Then {g} sent {him} to {place} to fetch {~pocket}.",
    ]);
    t.say(&[
        "But what was that? There were {~colour} lanterns everywhere!",
        "But there was a long table with a {~colour} cloth.",
        "Something moved {spot}. Somebody giggled {spot2}.",
    ]);
    t.say(&[
        "\"Surprise!\" {~cries} all {his} friends.",
        "\"Happy birthday!\" {~cries} {f} and {g}.",
        "Then everyone jumped out and sang as loudly as they could.",
    ]);
    t.say(&[
        "{g} had made {a cake}, and {f} had made {gift}.",
        "There was {a cake} with candles, and {f} gave {him} {gift}.",
        "There was {a cake}, {a food} and even {a food2}.",
        "{v} had brought {a cake}, and {f} played the fiddle.",
    ]);
    t.may_say(&[
        "\"How could we forget you?\" {~laughs} {f}.",
        "\"It was so hard to keep it secret,\" said {f}.",
        "{h} was so {~glad} that {he} {~danced}.",
    ]);
    good_night(t);
}

fn rescue(t: &mut Teller) {
    outing(t);
    t.frame(CREATURES);
    t.say(&[
        "There {he} found {a creature}.",
        "Then {he} saw {a creature}.",
        "Suddenly {he} heard a faint sound. It was {a creature}.",
        "{he} almost stepped on {a creature}.",
    ]);
    t.say(&["{trouble}"]);
    t.say(&[
        "\"You poor thing,\" said {h}.",
        "\"Do not be afraid,\" {he} said softly.",
        "\"I must help it,\" thought {h}, \"but how?\"",
        "It looked at {h} with eyes like {~bright}.",
    ]);
    if t.sometimes(1, 2) {
        t.say(&[
            "{he} ran to fetch {f.the}.",
            "{he} called {f.the}, who knew a lot about such things.",
            "{f.the} heard {him} and came at once, {~doing}.",
        ]);
        t.say(&[
            "\"We must be very careful,\" {~whispers} {f}.",
            "\"It is more afraid than we are,\" {~whispers} {f}.",
            "\"I know what to do,\" {~whispers} {f}.",
        ]);
        t.say(&["Together they {care}.", "Without a word they {care}.", "Quickly they {care}."]);
    } else {
        t.say(&[
            "{he} thought for a moment.",
            "{he} remembered what {g} always did.",
            "Nobody else was there, so {he} had to do it alone.",
        ]);
        t.say(&["Very gently {he} {care}.", "Then {he} {care}."]);
    }
    t.say(&["{until}. {thanks}"]);
    t.say(&[
        "\"Goodbye!\" {~cries} {h}. \"Take care of yourself!\"",
        "{h} waved for a long time.",
        "{h} was {~gloomy} and {~glad} at the same time.",
        "{h} was so {~glad} that {he} {~danced}.",
    ]);
    t.say(&[
        "\"You have a good heart,\" said {g} that evening.",
        "And every spring it came back to say hello.",
        "That evening {he} told {g} all about it over {~drink}.",
        "Small creatures have long memories, and so this one never forgot {h}.",
        "{h} named it {~petname} and never forgot it.",
    ]);
}

fn rain(t: &mut Teller) {
    t.frame(PLACES);
    t.say(&[
        "All week {he} had been looking forward to a picnic {at}.",
        "{~when} {he} wanted to fly {his} kite {at}.",
        "\"Tomorrow we will go to {place},\" {g} had promised.",
        "{he} had invited {~many} friends to a party {at}.",
    ]);
    t.say(&[
        "The basket was packed with {a food} and {a food2}.",
        "{he} had packed {a food} and a {~colour} blanket.",
        "{he} had already put on {his} {~colour} boots.",
    ]);
    t.say(&[
        "But then dark clouds came over the {~far}, and it began to rain.",
        "But just then the first drops fell, and soon it was pouring.",
        "But there was thunder in the valley, and the rain came down like a curtain.",
        "But then it rained as if somebody had tipped over {~tipped}.",
    ]);
    t.say(&[
        "\"Now everything is spoiled,\" said {h} {~sadly}.",
        "{h} pressed {his} nose against the window.",
        "\"Stupid rain!\" {~cries} {h}.",
        "{h} made a face as long as {~long}.",
    ]);
    t.say(&[
        "\"The rain can not come into the kitchen,\" {~laughs} {g}.",
        "\"Then we will bring {place} into the house,\" {~laughs} {g}.",
        "\"Who says that we need the sun?\" asked {g}.",
        "\"Let me think,\" said {g} and thought for {~many} minutes.",
    ]);
    t.say(&[
        "They spread a {~colour} blanket under the table.",
        "They made a tent of chairs and {~colour} sheets.",
        "They sat down on the kitchen floor.",
        "They hung a paper sun over the stove.",
    ]);
    t.say(&[
        "{f.the} came too, with {~pocket} for everyone.",
        "Soon {f.the} knocked, wet from head to foot.",
        "{f.the} had brought a lamp and {a cake}.",
        "Then {f.the} looked in, {~doing}.",
    ]);
    t.say(&[
        "They ate, and the rain drummed on the roof like {~noise}.",
        "They told stories about {~dream}, and each one was longer than the last.",
        "{f} played the fiddle, and everyone danced.",
        "They let little paper boats sail in the puddles.",
        "They drank {~drink} and counted the drops on the window.",
    ]);
    t.may_say(&[
        "Nobody noticed that the rain had stopped.",
        "When they looked up, there was a rainbow over the {~far}.",
    ]);
    t.say(&[
        "\"I hope it rains again tomorrow,\" said {h}.",
        "\"That was better than any picnic,\" said {h}.",
        "It was the finest rainy day of the whole {~span}.",
        "\"Thank you, rain!\" {~cries} {h}.",
    ]);
}

fn learning(t: &mut Teller) {
    t.frame(SKILLS);
    t.say(&[
        "{he} wanted to {skill} more than anything else.",
        "{he} could do many things, but {he} could not {skill}.",
        "{~when} {he} saw how {v} could {skill}, and {he} wanted to do it too.",
        "All {his} friends could {skill}, only {he} could not.",
    ]);
    t.say(&[
        "On Monday {he} tried for the first time. {^fail}",
        "{he} tried it in secret, where only {~many} {~pets} could see {him}. {^fail}",
        "\"It can not be so hard,\" {he} thought. {^fail}",
        "{~when} {he} tried it. {^fail}",
    ]);
    t.say(&[
        "On Tuesday it was no better. {^fail2}",
        "{he} tried again. {^fail2}",
        "The second time was even worse. {^fail2}",
        "{~many} days later {he} still could not do it. {^fail2}",
    ]);
    t.say(&[
        "\"I will never learn it,\" said {h} {~sadly}.",
        "A {~bird} in the {~tree} laughed at {him}.",
        "{h} was tired and {~gloomy}.",
        "{h} kicked the {~kicked} and was angry.",
    ]);
    t.say(&[
        "\"I tried {~many} times before I could do it,\" said {f.the}.",
        "\"You only have to try once more than you fail,\" said {f.the}.",
        "\"Do not think about it,\" said {f.the}. \"Think of {~dream}.\"",
        "\"Shut your eyes and breathe,\" said {f.the}. \"And now again.\"",
    ]);
    t.say(&[
        "So {h} tried every day, in the sun and in the rain.",
        "{h} shut {his} eyes, took a deep breath and thought of {~dream}.",
        "{h} nodded and tried again and again and again.",
        "{h} practised until the {~lights} came out.",
    ]);
    t.say(&[
        "And on Sunday, {well}.",
        "Then, all of a sudden, {well}.",
        "And when nobody expected it any more, {well}.",
        "And {~when}, {well}.",
    ]);
    t.say(&[
        "\"I can do it!\" {~cries} {h}. \"I can {skill}!\"",
        "\"Did you see that?\" {~cries} {h}.",
        "{f} clapped, and the {~bird} in the {~tree} was silent.",
        "{f} was so {~glad} that {f.he} {~danced}.",
    ]);
    t.say(&[
        "Soon {h} taught everyone who wanted to learn it.",
        "\"I always knew it,\" said {g}.",
        "{h} was so {~glad} that {he} did it all {~worktime} long.",
        "And {h} never said \"never\" again.",
        "That night {h} dreamed of {~dream}.",
    ]);
}

fn seed(t: &mut Teller) {
    t.frame(SEEDS);
    t.say(&[
        "{~when} {g} gave {him} {a seed} seed.",
        "{~when} {he} found {a seed} seed in {his} pocket.",
        "{~when} {v} gave {him} {a seed} seed. \"Take good care of it,\" {v.he} said.",
        "{~when} a {~bird} dropped {a seed} seed on the windowsill.",
    ]);
    t.say(&[
        "{h} put it into the soil and watered it.",
        "{h} dug a little hole beside the {~fence} and planted it.",
        "{h} planted it where the sun shone longest.",
        "{h} planted it in {a ~colour} pot.",
    ]);
    t.say(&[
        "The next morning {he} ran outside. There was nothing to see.",
        "{he} sat down beside it and waited, but nothing happened.",
        "A day went by, and then a week, and still there was nothing.",
        "After {~many} days there was still nothing to see but {junk}.",
    ]);
    t.say(&[
        "\"It does not like me,\" said {h} to {f.the}.",
        "\"It is broken,\" {he} told {f.the}.",
        "{f.the} came to visit, {~doing}. \"I want to dig it up,\" said {h}.",
        "{h} was so {~gloomy} that {f.the} came to visit.",
    ]);
    t.say(&[
        "\"It is only sleeping,\" said {f}.",
        "\"Good things take their time,\" said {f}.",
        "\"You must be patient,\" said {f}. \"It is working under the ground.\"",
        "\"Perhaps it dreams of {~dream},\" said {f}.",
    ]);
    t.say(&[
        "So {h} waited and sang to it every evening.",
        "So they watered it and told it stories about {~dream}.",
        "It rained, and the sun shone, and {h} waited.",
        "So {h} counted the days. {^~many} went by, and then {~many} more.",
    ]);
    t.say(&[
        "Then one morning something green was peeping out of the soil.",
        "And when {he} had almost forgotten it, the soil moved.",
        "{~when} {f} {~cries}, \"Come quickly!\"",
    ]);
    t.say(&["{grown}"]);
    t.say(&["{use}"]);
    t.say(&[
        "And {h} kept one seed for the next year.",
        "\"You see,\" said {f}, \"it only wanted to be asked nicely.\"",
        "From then on {h} was the most patient {h.kind} in the valley.",
        "{g} said that it was the finest one {g.he} had ever seen.",
        "\"It is better than {~riches},\" said {h}.",
    ]);
}

fn thief(t: &mut Teller) {
    t.frame(THIEVES);
    t.say(&[
        "{~when} {stolen} was missing from the kitchen.",
        "{~when} {g} was puzzled. Somebody had taken {stolen}.",
        "Every night something disappeared. First it was {stolen}, and then it was {stolen2}.",
        "{~when} {v} came running. \"Somebody has taken {stolen}!\" {v.he} {~cries}.",
    ]);
    t.say(&[
        "\"It was not me,\" said {h} to {f.the}. \"Let us find the thief.\"",
        "\"That is a case for us,\" {he} said to {f.the}.",
        "{h} took a lamp and asked {f.the} to come along.",
        "{h} and {f.the} put on {~colour} hats and went to work.",
    ]);
    t.say(&[
        "On the floor they found {trace}.",
        "{f} was the first to see {trace}.",
        "\"Look at this!\" {~whispers} {f}. They saw {trace}.",
    ]);
    t.say(&[
        "The trail led {lair}.",
        "It led them past the {~fence} and {lair}.",
        "On tiptoe they followed the trail {lair}.",
    ]);
    t.say(&[
        "It was as dark as {~dark}, and {h} held {f}'s hand.",
        "Something was moving. \"Hush!\" {~whispers} {f}.",
        "\"You go first,\" {~whispers} {f}. \"No, you,\" {~whispers} {h}.",
        "{h} took {weapon}, and {f} took {weapon2}.",
    ]);
    t.say(&[
        "And who was sitting there? It was {thief}!",
        "There they found {thief}.",
        "Then {h} held up the lamp and saw {thief}.",
    ]);
    t.say(&["{why}"]);
    t.say(&[
        "\"We can not be angry about that,\" said {h}.",
        "\"You could have asked,\" said {h}, but {he} was smiling.",
        "{h} and {f} looked at each other and began to laugh.",
        "\"Well, well,\" said {f}, and {f.his} eyes were as big as {~round}.",
    ]);
    t.say(&[
        "From then on, {g} put a little plate outside every night.",
        "So they brought {a food} and stayed for supper.",
        "They never told anyone, and the secret is safe to this day.",
        "The next morning there was {gift} on the doorstep.",
    ]);
    t.may_say(&[
        "And nothing was ever missing again.",
        "\"Case closed,\" said {f}.",
        "Then they all drank {~drink}.",
    ]);
}

fn broken(t: &mut Teller) {
    t.frame(BREAKABLES);
    t.say(&[
        "{~when} {how}, and then {g}'s {broken} was broken.",
        "{~when}, when nobody was at home, {how}. Crash! {^g}'s {broken} was broken.",
        "It happened {~when}. {^how}, and there was a terrible crash. It was {g}'s {broken}.",
    ]);
    t.say(&[
        "{h} stood still and did not dare to breathe.",
        "\"Oh no,\" {~whispers} {h}.",
        "{his} ears became as red as {~red}.",
        "{h} became as stiff as a {~stiff}.",
    ]);
    t.say(&[
        "Quickly {he} hid {~hiding}.",
        "\"I could say that it was the {~pets},\" {he} thought.",
        "\"Perhaps nobody will notice,\" {he} thought and {~went} to the {~tree}.",
    ]);
    t.say(&[
        "But {his} tummy hurt, and it was not from hunger.",
        "But the secret grew as heavy as {~heavy}.",
        "But at supper {he} could not swallow a single bite.",
        "But {he} did not feel like {~good} any more.",
    ]);
    t.may_say(&[
        "\"A lie is like a stone in your shoe,\" {f.the} had once told {him}.",
        "\"Tell the truth,\" said {f.the}. \"It only hurts for a moment.\"",
        "{he} told {f.the} about it. \"You know what you must do,\" said {f}.",
    ]);
    t.say(&[
        "At last {he} went to {g} and said, \"It was me. I am so sorry.\"",
        "Then {he} took a deep breath and told {g} everything.",
        "\"I have broken your {broken},\" {he} said, and a {~big} tear fell on the floor.",
        "{he} counted to {~many} and said to {g}, \"I did it.\"",
    ]);
    t.say(&[
        "{g} was quiet for a moment. Then {g.he} took {him} in {g.his} arms.",
        "\"A {broken} can be mended,\" {~says} {g}. \"Thank you for telling me.\"",
        "\"It was brave of you to tell me,\" {~says} {g}.",
        "\"When I was little, I broke {~many} of them,\" {~says} {g}.",
    ]);
    t.say(&["Together they {mend}.", "That afternoon they {mend}.", "They took their time and {mend}."]);
    t.say(&[
        "It looked even nicer than before.",
        "Nobody else could see the difference.",
        "It was not as good as new, but they both liked it better.",
        "Then they painted it {~colour}, and it was {~brighter} than before.",
    ]);
    good_night(t);
}

fn wonder(t: &mut Teller) {
    t.frame(WONDERS);
    t.say(&[
        "{his} greatest wish was to catch {wonder}.",
        "{~when} {he} said to {g}, \"Today I will catch {wonder}.\"",
        "{~when} {he} made up {his} mind to catch {wonder}.",
        "\"Nobody has ever caught {wonder},\" {g} once said. \"Then I will be the first,\" said {h}.",
    ]);
    t.say(&[
        "{he} took {tool} and set out.",
        "{he} asked {v} for {tool}.",
        "\"You will need {tool},\" said {v} with a smile.",
        "{he} packed {tool}, {~pocket} and {a food}.",
    ]);
    t.frame(PLACES);
    t.say(&[
        "{he} {~went} to {place} and looked up and down.",
        "{he} {~went} to {place}.",
        "{he} waited {at} for a long time.",
        "{he} tried it {at} for {~many} hours.",
    ]);
    t.say(&["{almost}"]);
    t.say(&[
        "But however hard {he} tried, {he} could not keep it.",
        "{he} tried again and again, until {his} {~shaking} hurt.",
        "Then it was gone, and {h} was {~gloomy}.",
    ]);
    friend_asks(t);
    t.say(&[
        "\"I wanted to catch {wonder},\" said {h}, \"and to keep it.\"",
        "\"I almost had {wonder},\" said {h} {~sadly}.",
        "\"I want to take {wonder} home,\" said {h}.",
    ]);
    t.say(&[
        "{f} did not laugh. {^f.he} sat down beside {him}.",
        "{f} thought about this for {~many} minutes.",
        "\"I tried that once,\" {~says} {f}, \"with {tool2}.\"",
    ]);
    t.say(&["{stays}"]);
    t.say(&[
        "{h} thought about that and nodded.",
        "\"You are right,\" said {h}.",
        "\"I never thought of that,\" said {h}.",
        "{h} was so {~glad} that {he} {~danced}.",
    ]);
    together(t);
}
